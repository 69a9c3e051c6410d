"""The index of features: every table against a direct count, interrupted runs, and the commands."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.interventions.values import digest
from hooked_vla.rollouts.records import read_episodes
from hooked_vla.rollouts.sae import index as module
from hooked_vla.rollouts.sae.collect import ROLLOUTS, collect
from hooked_vla.rollouts.sae.feature_index import FeatureIndex
from hooked_vla.rollouts.sae.index import build_index, simulator_labels
from hooked_vla.rollouts.settings import Options
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.feature_steps import FeatureSteps
from hooked_vla.sae.generality import PUBLISHED, episode_statistics
from hooked_vla.sae.presets import preset
from hooked_vla.sae.rows import Capture
from hooked_vla.sae.store import TokenStore

# the suite without a simulator is beside the tests of the runner
sys.path.insert(0, str(Path(__file__).parent.parent))
from toy_suite import tiny, toy_suite

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
OPTIONS = Options(n_envs=4, n_action_steps=4, image_size=32, max_steps=12)
BLOCK = 150


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", BLOCK)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("collected") / "s"
    return collect(tiny("smolvla"), toy_suite(), [VLM, EXPERT], 8, 5, folder, options=OPTIONS)


def sae_of(store: TokenStore, site: str, **changes) -> SparseAutoencoder:
    config = preset("hooked", "tiny", site, store.widths[site], architecture="topk", n_features=40, k=4, **changes)
    sae = SparseAutoencoder(config)
    sae.start(store.read(site, torch.arange(store.n_rows(site))))
    return sae.eval()


@pytest.fixture(scope="module")
def built(store, tmp_path_factory):
    """The index of the expert's site, with its autoencoder."""
    sae = sae_of(store, EXPERT)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "BLOCK_ROWS", BLOCK)
        return sae, build_index(store, sae, tmp_path_factory.mktemp("index") / "i")


@pytest.fixture(scope="module")
def plain(store, built) -> pd.DataFrame:
    """Every feature above 0, found directly."""
    sae, _ = built
    f = sae.encode(store.read(EXPERT, torch.arange(store.n_rows(EXPERT)))).detach()
    row, feature = (f > 0).nonzero(as_tuple=True)
    ids = store.ids(EXPERT)[row].numpy()
    names = ["episode", "env_step", "denoise_step", "segment", "camera", "position"]
    return pd.DataFrame(ids, columns=names).assign(
        feature=feature.numpy(), row=row.numpy(), value=f[row, feature].numpy()
    )


def test_activations_are_those_of_a_direct_run(built, plain):
    _, index = built
    order = ["feature", "row"]
    found = index.sql("SELECT * FROM activations").sort_values(order, ignore_index=True)
    expected = plain.sort_values(order, ignore_index=True)
    assert len(list((index.folder / "activations").iterdir())) > 1
    for name in ("feature", "row", "episode", "env_step", "denoise_step", "segment", "position"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5, atol=1e-6)


def test_top_frames_and_episodes_are_the_largest(built, plain, store):
    _, index = built
    labels = simulator_labels(store).set_index(["episode", "env_step"])
    for feature in plain["feature"].value_counts().index[:3].tolist():
        own = plain[plain["feature"] == feature]
        peaks = own.groupby(["episode", "env_step"])["value"].max().sort_values(ascending=False)
        top = index.top_frames(feature, 5)
        np.testing.assert_allclose(top["maximum"], peaks.iloc[:5], rtol=1e-5)
        for row in top.itertuples():
            place = row.episode, row.env_step
            assert peaks[place] == pytest.approx(row.maximum, rel=1e-5)
            assert (row.task, row.phase) == tuple(labels.loc[place, ["task", "phase"]])
            assert row.n_active == len(own[(own["episode"] == row.episode) & (own["env_step"] == row.env_step)])
        assert index.top_frames(feature, 50, per_episode=1)["episode"].is_unique
        episodes = index.top_episodes(feature, 3)
        np.testing.assert_allclose(
            episodes["maximum"], own.groupby("episode")["value"].max().sort_values(ascending=False).iloc[:3], rtol=1e-5
        )
        assert (episodes["active"] <= 1).all()


def test_heat_maps_show_every_token_where_it_is(built, plain, store):
    _, index = built
    feature = int(plain["feature"].value_counts().index[0])
    top = index.top_frames(feature, 1).iloc[0]
    maps = index.heat_map(feature, int(top["episode"]), int(top["env_step"]))
    assert [each.segment for each in maps] == ["action"]
    assert maps[0].denoise_steps == tuple(range(tiny("smolvla").n_denoise_steps)) and len(maps[0].position) > 1
    own = plain[(plain["feature"] == feature) & (plain["episode"] == top["episode"])]
    own = own[own["env_step"] == top["env_step"]]
    total = 0
    for each in maps:
        for row in own[own["segment"] == store.names.segment.index(each.segment)].itertuples():
            step, token = each.denoise_steps.index(row.denoise_step), each.position.tolist().index(row.position)
            assert each.value[step, token] == pytest.approx(row.value, rel=1e-5)
            total += 1
        assert (each.value > 0).sum() <= total
    assert total == len(own) == sum(int((each.value > 0).sum()) for each in maps)


def test_images_are_squares(store, tmp_path):
    index = build_index(store, sae_of(store, VLM), tmp_path / "i")
    maps = {each.segment: each for each in index.heat_map(3, 0, 0)}
    assert maps["image:agent"].camera == "agent" and maps["image:agent"].denoise_steps == ()
    grid = maps["image:agent"].grid()
    assert grid.shape[1] == grid.shape[2] and grid.shape[0] == 1
    assert maps["language"].camera is None
    lengths = {each["episode"]: each["n"] for each in index.sql(
        "SELECT episode, count(*) AS n FROM layout GROUP BY 1").to_dict("records")}  # fmt: skip
    assert len(lengths) == 8


def test_figures_of_features_are_direct_counts(built, plain, store):
    _, index = built
    table = index.features().set_index("feature").sort_index()
    n = store.n_rows(EXPERT)
    counts = plain["feature"].value_counts()
    assert len(table) == 40 and index.features(n=3)["density"].is_monotonic_decreasing
    frames = index.sql("SELECT episode, env_step FROM frames ORDER BY ALL")
    steps = FeatureSteps.of(
        [frames.index[(frames["episode"] == e) & (frames["env_step"] == t)][0]
         for e, t in zip(plain["episode"], plain["env_step"], strict=True)],
        plain["feature"], plain["value"], frames["episode"], 40,
    )  # fmt: skip
    expected = episode_statistics(steps)
    general = PUBLISHED["libero"].probability(expected)
    for feature in range(40):
        row = table.loc[feature]
        assert row["density"] == pytest.approx(counts.get(feature, 0) / n)
        assert row["coverage"] == pytest.approx(expected.coverage[feature])
        assert row["frames"] == pytest.approx(expected.frequency[feature])
        if feature in counts:
            assert row["general"] == pytest.approx(general[feature], rel=1e-5)
            assert row["maximum"] == pytest.approx(plain[plain["feature"] == feature]["value"].max(), rel=1e-5)
        else:
            assert np.isnan(row["general"]) and row["description"] == "never active"
    assert index.feature(0)["feature"] == 0
    last = index.features("general")["general"].isna().to_numpy()
    assert not last[: int((~last).sum())].any()


def test_shares_add_up_and_lifts_are_against_all_steps(built, plain, store):
    _, index = built
    feature = int(plain["feature"].value_counts().index[0])
    shares = index.shares(feature)
    for _, part in shares.groupby("kind"):
        assert part["share"].sum() == pytest.approx(1.0)
    labels = simulator_labels(store)
    own = plain[plain["feature"] == feature].merge(labels[["episode", "env_step", "task"]], on=["episode", "env_step"])
    rows = pd.DataFrame(store.ids(EXPERT)[:, :2].numpy(), columns=["episode", "env_step"]).merge(labels)
    for row in shares[shares["kind"] == "task"].itertuples():
        share = own[own["task"] == row.value]["value"].sum() / own["value"].sum()
        assert row.share == pytest.approx(share, rel=1e-4)
        assert row.lift == pytest.approx(share / (rows["task"] == row.value).mean(), rel=1e-4)
    steps = shares[shares["kind"] == "denoise_step"]
    assert set(steps["value"]) <= {str(i) for i in range(tiny("smolvla").n_denoise_steps)}


def test_neighbours_and_search_lead_to_features(built):
    sae, index = built
    near = index.neighbours(3)
    cosine = torch.nn.functional.cosine_similarity(sae.w_dec[3], sae.w_dec, dim=1).detach()
    cosine[3] = -1
    assert near["neighbour"][0] == int(cosine.argmax()) and near["value"][0] == pytest.approx(float(cosine.max()))
    assert (index.neighbours(int(near["neighbour"][0]), "coactive")["value"] <= 1).all()
    described = index.features()["description"]
    word = next(text for text in described if "task " in text).split("task ")[1].split()[0]
    found = index.search(word, 40)
    assert len(found) and all(word in text for text in found["description"])


def test_histograms_samples_and_courses_are_direct_counts(built, plain):
    _, index = built
    feature = int(plain["feature"].value_counts().index[0])
    own = plain[plain["feature"] == feature]
    counts, maximum = index.histogram(feature)
    assert maximum == pytest.approx(own["value"].max(), rel=1e-5) and counts.sum() == len(own)
    # rounding may move a value that is on an edge
    edges = np.linspace(0, maximum, len(counts) + 1)
    expected, _ = np.histogram(own["value"].clip(upper=maximum), edges)
    assert np.abs(counts - expected).sum() <= 2
    peaks = own.groupby(["episode", "env_step"])["value"].max().sort_values(ascending=False).to_numpy()
    found = index.sampled_frames(feature, (0.0, 0.5, 1.0))
    wanted = peaks[[0, round(0.5 * (len(peaks) - 1)), -1]]
    np.testing.assert_allclose(found["maximum"], wanted, rtol=1e-5)
    assert found["share"].tolist() == [0.0, 0.5, 1.0]
    course = index.course(feature, [2, 0])
    assert list(dict.fromkeys(course["episode"])) == [2, 0]
    mine = own[own["episode"] == 2].groupby("env_step")["value"].max()
    for row in course[course["episode"] == 2].itertuples():
        assert row.maximum == pytest.approx(mine.get(row.env_step, 0.0), rel=1e-5)
    for call, said in (
        (lambda: index.course(feature, [99]), r"no episodes \[99\]"),
        (lambda: index.sampled_frames(feature, [2.0]), "in 0..1"),
        (lambda: index.histogram(40), "no feature 40"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_directions_are_those_of_the_decoder(built):
    sae, index = built
    table = index.sql("SELECT * FROM directions ORDER BY feature")
    assert table["sha256"].tolist() == [digest(row) for row in sae.w_dec.detach().float()]
    unit = torch.nn.functional.normalize(sae.w_dec.detach().double(), dim=1).numpy()
    components = np.stack(table["components"])
    np.testing.assert_allclose(components[:, 0], table["x"], rtol=1e-6)
    # as many components as features keep all distances
    centred = unit - unit.mean(0)
    assert components.shape == (40, min(module.N_COMPONENTS, *unit.shape))
    np.testing.assert_allclose(components @ components.T, centred @ centred.T, atol=1e-5)
    assert (np.diff(components.var(0)) <= 1e-9).all()


def test_a_feature_shows_itself_and_its_text_stays_text(built, store, tmp_path):
    _, index = built
    feature = index.feature(index.ranking()[0][0])
    page = feature.show(n=2)
    for row in index.top_frames(feature["feature"], 2, per_episode=1).itertuples():
        assert f"episode {row.episode}, step {row.env_step}" in page.markup
    assert feature["description"].split(";")[0] in page.markup and "<svg" in page._repr_html_()
    assert repr(feature).startswith(f"feature {feature['feature']} of {EXPERT}: ")
    shutil.copytree(index.folder, tmp_path / "i")
    table = pq.read_table(tmp_path / "i" / "features.parquet")
    place = table.column_names.index("description")
    pq.write_table(
        table.set_column(place, "description", [["<script>x</script>"] * 40]), tmp_path / "i" / "features.parquet"
    )
    shown = FeatureIndex(tmp_path / "i").feature(0).show(1).markup
    assert "<script" not in shown and "&lt;script&gt;x" in shown
    with pytest.raises(ValueError, match="n must not be negative"):
        feature.show(-1)


def test_an_opened_index_reads_its_folder_alone(built, tmp_path):
    _, index = built
    (tmp_path / "other.csv").write_text("a\n1\n")
    with pytest.raises(Exception, match="file system operations are disabled"):
        index.sql("SELECT * FROM read_csv(?)", [str(tmp_path / "other.csv")])
    index.close()
    assert len(index.features(n=3)) == 3


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_index_that_was_interrupted_goes_on(built, store, tmp_path, monkeypatch, stop):
    """stop: after so many files, which is among activations and among tables."""
    sae, whole = built
    real, made = module._write, []

    def write(path, table):
        real(path, table)
        made.append(path)
        if len(made) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            build_index(store, sae, tmp_path / "i")
    with pytest.raises(ValueError, match="not complete: run what makes it again"):
        FeatureIndex(tmp_path / "i")
    build_index(store, sae, tmp_path / "i")
    assert contents(tmp_path / "i") == contents(whole.folder)
    with monkeypatch.context() as patched:
        # nothing is left to do
        patched.setattr(module, "_write", None)
        build_index(store, sae, tmp_path / "i")


def test_mistakes_are_named(built, store, tmp_path):
    sae, index = built
    build = partial(build_index, store)
    with pytest.raises(ValueError, match="holds another index: .*sae.* differ"):
        build(sae_of(store, EXPERT, seed=9), index.folder)
    with pytest.raises(ValueError, match="are of rows|is of rows pooled by 'mean'"):
        build(SparseAutoencoder(sae.config.changed(pooling="mean")), tmp_path / "x")
    with pytest.raises(KeyError, match="nearest"):
        build(SparseAutoencoder(sae.config.changed(site="expert.blocks.9.hook_resid_post")), tmp_path / "x")
    with pytest.raises(ValueError, match=r"no labels for plans .*\[\[0, 0\]"):
        build(sae, tmp_path / "y", labels=simulator_labels(store).iloc[1:])
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has no manifest.json, but holds \['a.txt'\]"):
        build(sae, tmp_path / "z")
    assert not (tmp_path / "x").exists()
    for call in (index.top_frames, index.shares, index.neighbours, index.feature):
        with pytest.raises(ValueError, match="no feature 40"):
            call(40)
    with pytest.raises(ValueError, match="no plan at episode 0, environment step 3"):
        index.heat_map(0, 0, 3)
    with pytest.raises(ValueError, match="kind must be one of"):
        index.neighbours(0, "best")
    with pytest.raises(ValueError, match="cannot be sorted by 'size'"):
        index.features("size")
    with pytest.raises(FileNotFoundError, match="not an index"):
        FeatureIndex(tmp_path / "nowhere")
    shutil.copytree(index.folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "peaks.parquet").unlink()
    with pytest.raises(ValueError, match=r"damaged: \['peaks'\] are missing"):
        FeatureIndex(tmp_path / "damaged")


def test_means_have_no_tokens_but_all_else(tmp_path):
    store = collect(
        tiny("smolvla"), toy_suite(), Capture([VLM], "segment_mean"), 2, 5, tmp_path / "s", options=OPTIONS
    )  # fmt: skip
    index = build_index(store, sae_of(store, VLM, pooling="segment_mean"), tmp_path / "i")
    assert index.features()["density"].max() > 0 and len(read_episodes(store.folder / ROLLOUTS)) == 2
    with pytest.raises(ValueError, match="they have no tokens"):
        index.heat_map(0, 0, 0)


def call(*arguments: str):
    return CliRunner().invoke(app, ["sae", *arguments], terminal_width=300)


def test_the_commands_make_and_show_an_index(built, store, tmp_path):
    sae, index = built
    sae.save_pretrained(tmp_path / "sae")
    done = call("index", "--store", str(store.folder), "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "i"))
    assert done.exit_code == 0 and "description" in done.output, done.output
    shown = call("features", str(tmp_path / "i"), "--json", "--n", "3")
    assert [each["feature"] for each in json.loads(shown.output)] == index.features(n=3)["feature"].tolist()
    feature = json.loads(shown.output)[0]["feature"]
    one = call("features", str(tmp_path / "i"), "--feature", str(feature), "--json")
    assert json.loads(one.output)["frames"][0]["episode"] == index.top_frames(feature)["episode"][0]
    assert f"feature {feature} of {EXPERT}" in call("features", str(tmp_path / "i"), "--feature", str(feature)).output
    assert "features of" in call("features", str(tmp_path / "i"), "--search", "task").output
    for arguments, said in (
        (("features", str(tmp_path / "i"), "--feature", "99"), "no feature 99"),
        (("features", str(tmp_path / "none")), "not an index of features"),
        (("index", "--store", str(store.folder), "--sae", "none", "--out", str(tmp_path / "j")), "no folder with"),
        (("index", "--store", str(store.folder), "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "i"),
          "--coefficients", "mine"), "unknown coefficients"),
    ):  # fmt: skip
        wrong = call(*arguments)
        assert wrong.exit_code == 2 and said in " ".join(wrong.output.replace("│", "").split()), wrong.output
