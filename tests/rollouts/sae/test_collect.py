"""Activations on policy: rows are those of a direct run, whatever batch they were in, and nothing is lost."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close

from hooked_vla import Observation
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.sae import collect as module
from hooked_vla.rollouts.sae.collect import ROLLOUTS, RolloutSource, collect
from hooked_vla.rollouts.settings import Options, constant_text
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.sae.rows import IDS, NONE, Capture, previous_rows
from hooked_vla.sae.source import PREVIOUS, Source
from hooked_vla.sae.store import TokenStore
from hooked_vla.sae.store_source import StoreSource

# the suite without a simulator is beside the tests of the runner
sys.path.insert(0, str(Path(__file__).parent.parent))
from toy_suite import tiny, toy_suite

VLM, EXPERT, VISION = "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post", "vision.blocks.0.hook_mlp_out"
SITES = [VLM, EXPERT, VISION]
OPTIONS = Options(n_envs=3, n_action_steps=4, image_size=32, max_steps=10)
EPISODES = 7


@pytest.fixture(scope="module")
def model():
    return tiny("smolvla")


def run(folder: Path, **settings) -> TokenStore:
    settings = {"sites": SITES, "options": OPTIONS, "shard_rows": 512} | settings
    return collect(tiny("smolvla"), toy_suite(), settings.pop("sites"), EPISODES, 5, folder, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    return run(tmp_path_factory.mktemp("collected") / "s")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class Seen(Watcher):
    """What every episode showed at every step."""

    draws_every_step = True

    def __init__(self) -> None:
        self.frames = {}

    def step(self, cell, env_step, before, action, reward, info) -> None:
        self.frames[cell.id, env_step] = before, cell.seed


def test_rows_are_what_a_direct_run_of_that_step_gives(store, model):
    """Episode by episode alone, from the observation of that step and the noise of its seed."""
    seen, rng = Seen(), np.random.default_rng(0)
    run_rollouts(model, toy_suite(), EPISODES, seed=5, options=OPTIONS, watchers=[seen])
    for site in SITES:
        ids = store.ids(site)
        assert len({tuple(row) for row in ids.tolist()}) == len(ids)
        rows = rng.choice(len(ids), 12, replace=False)
        for row, values in zip(rows, store.read(site, torch.from_numpy(rows)), strict=True):
            episode, env_step, denoise, segment, camera, position = ids[row].tolist()
            frame, seed = seen.frames[episode, env_step]
            obs = Observation(frame["pixels"], frame["state"], frame["instruction"])
            with constant_text(model.processor, True), torch.no_grad():
                noise = SeededNoise.of(model, obs)([seed], env_step)
                _, cache = model.run_with_cache(obs, site, noise=noise)
            value = cache[site] if denoise == NONE else cache[site][denoise]
            assert_close(values, value.flatten(0, 1)[position])
            segments = cache.segments[model.points[site].streams["seq"]]
            name = store.names.segment[segment]
            assert segments.names[int(segments.labels.flatten()[position])] == name
            assert (None if camera == NONE else f"image:{store.names.camera[camera]}") == (
                name if name.startswith("image:") else None
            )


def test_every_plan_of_every_episode_is_there_and_nothing_else(store, model):
    episodes, steps = read_episodes(store.folder / ROLLOUTS), read_steps(store.folder / ROLLOUTS)
    planned = {
        (row["episode"], row["env_step"]) for row in steps.select(["episode", "env_step", "chunk_step"]).to_pylist()
        if row["chunk_step"] == 0
    }  # fmt: skip
    assert store.episodes == list(range(EPISODES)) == episodes["episode"].to_pylist() and store.complete
    for site in SITES:
        ids = store.ids(site)
        assert {tuple(row) for row in ids[:, :2].tolist()} == planned
        wanted = set(range(model.n_denoise_steps)) if site == EXPERT else {NONE}
        assert set(ids[:, 2].tolist()) == wanted
    assert store.groups == [[VISION], [VLM], [EXPERT]]
    assert store.about["weights"] and store.about["sites"] == [VISION, VLM, EXPERT] and store.about["suite"] == "toy"


def test_collecting_does_not_change_what_the_policy_does(store, model, tmp_path):
    plain = run_rollouts(model, toy_suite(), EPISODES, seed=5, options=OPTIONS, out=tmp_path / "run")
    assert read_steps(plain.folder).equals(read_steps(store.folder / ROLLOUTS))


def test_a_row_is_the_same_whatever_runs_beside_it(store, tmp_path):
    other = run(tmp_path / "s", options=replace(OPTIONS, n_envs=2))
    for site in SITES:
        first, second = store.ids(site), other.ids(site)
        place = {tuple(row): i for i, row in enumerate(second.tolist())}
        rows = torch.tensor([place[tuple(row)] for row in first.tolist()])
        assert len(first) == len(second)
        assert_close(other.read(site, rows), store.read(site, torch.arange(len(first))))


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(store, tmp_path, monkeypatch, stop):
    """stop: after so many forward passes, which is inside of the first, second and last group."""
    made = []

    class Stopped(module.StoreWriter):
        def add(self, *arguments):
            super().add(*arguments)
            made.append(1)
            if len(made) == stop:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "StoreWriter", Stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s")
    assert not TokenStore(tmp_path / "s").complete
    assert contents(run(tmp_path / "s").folder) == contents(store.folder)
    # and once more: nothing is left to do
    assert contents(run(tmp_path / "s").folder) == contents(store.folder)


def test_what_does_not_belong_together_is_refused(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "s")
    with pytest.raises(ValueError, match="holds another store: sites: .* there"):
        run(tmp_path / "s", sites=[VLM])
    with pytest.raises(ValueError, match="pooling: 'token' there, 'mean' now"):
        run(tmp_path / "s", sites=Capture(SITES, "mean"))
    for path in (tmp_path / "s").iterdir():
        if path.name != ROLLOUTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json, but holds \['rollouts'\]"):
        run(tmp_path / "s")
    with pytest.raises(KeyError, match="nearest"):
        run(tmp_path / "t", sites="vlm.blocks.77.hook_resid_post")
    assert not (tmp_path / "t").exists()


def test_means_are_kept_and_read_like_tokens(store, tmp_path):
    means = run(tmp_path / "s", sites=Capture([VLM], "segment_mean", segments=("image:*",), dtype=torch.bfloat16))
    values, ids = means.read(VLM, torch.arange(means.n_rows(VLM))), means.ids(VLM)
    tokens, all_ids = store.read(VLM, torch.arange(store.n_rows(VLM))), store.ids(VLM)
    assert values.dtype == torch.bfloat16 and set(ids[:, 5].tolist()) == {NONE}
    for value, row in list(zip(values, ids, strict=True))[::5]:
        name = means.names.segment[int(row[3])]
        own = (all_ids[:, :3] == row[:3]).all(1) & (all_ids[:, 3] == store.names.segment.index(name))
        assert_close(value, tokens[own].mean(0), torch.bfloat16)


# On policy, without a store.


def source(**settings) -> RolloutSource:
    settings = {"sites": SITES, "seed": 5, "options": OPTIONS, "buffer_rows": 8192} | settings
    return RolloutSource(tiny("smolvla"), toy_suite(), **settings)


def test_a_source_gives_the_rows_of_its_episodes(store):
    """Of the scenes that are in the store too, which goes through them task by task."""
    stream = source().stream
    rows = {site: [] for site in SITES}
    for (unit, _), taken in stream((0, 0)):
        if unit == 1:
            break
        for site, values in taken.items():
            rows[site].append(values)
    first = {(cell.task, cell.seed) for cell in source().cells(0)}
    stored = read_episodes(store.folder / ROLLOUTS).select(["episode", "task", "seed"]).to_pylist()
    shared = [row["episode"] for row in stored if (row["task"], row["seed"]) in first]
    assert shared
    for site in SITES:
        mine = {values.numpy().tobytes() for values in torch.cat(rows[site])}
        theirs = store.read(site, store.find(site, {"episode": shared}))
        assert {values.numpy().tobytes() for values in theirs} <= mine


def test_batches_come_from_all_sites_and_go_on_exactly(model):
    whole, first, second = source(), source(), source()
    batches = [batch for _, batch in zip(range(5), whole.batches(60), strict=False)]
    assert isinstance(whole, Source) and whole.groups == [[VISION], [VLM], [EXPERT]]
    assert {site: list(rows.shape) for site, rows in batches[0].items()} == {
        site: [60, whole.widths[site]] for site in SITES
    }
    taken = first.batches(60)
    for _ in range(2):
        next(taken)
    second.load_state_dict(first.state_dict())
    rest = [batch for _, batch in zip(range(3), second.batches(60), strict=False)]
    assert all(torch.equal(a[site], b[site]) for a, b in zip(rest, batches[2:], strict=True) for site in SITES)
    for each in (whole, first, second):
        each.close()
    assert not any(point.listeners for point in model.points.values())


def test_the_model_is_the_callers_between_batches(model):
    own, plain = source(), source()
    obs = Observation({c: np.zeros((32, 32, 3), np.uint8) for c in ("agent", "wrist")}, np.zeros(4, np.float32), "go")
    expected = list(zip(range(3), plain.batches(60), strict=False))
    noise = SeededNoise.of(model, obs)([0], 0)
    batches, threads = own.batches(60), torch.get_num_threads()
    for _, batch in expected:
        mine = next(batches)
        assert all(torch.equal(mine[site], batch[site]) for site in SITES)
        assert model.run_state.env_step is None and torch.get_num_threads() == threads
        model.predict_action_chunk(obs, noise)
        run_rollouts(model, toy_suite(), 1, seed=77, options=OPTIONS)
    own.close()
    plain.close()


def test_the_token_before_comes_beside_it(store):
    own = source(sites=[VLM, EXPERT], previous=True)
    assert own.groups == [[VLM, VLM + PREVIOUS], [EXPERT, EXPERT + PREVIOUS]]
    everything = {site: store.read(site, torch.arange(store.n_rows(site))) for site in (VLM, EXPERT)}
    n_found = 0
    for (unit, number), rows in own.stream((0, 0)):
        if unit == 2:
            break
        assert number or not len(rows[VLM])
        for site in (VLM, EXPERT):
            ids = store.ids(site)
            place = {values.numpy().tobytes(): i for i, values in enumerate(everything[site])}
            for now, before in list(zip(rows[site], rows[site + PREVIOUS], strict=True))[::7]:
                if (here := place.get(now.numpy().tobytes())) is not None:
                    there = place[before.numpy().tobytes()]
                    row, earlier = ids[here], ids[there]
                    assert previous_rows(earlier[None], row[None]).tolist() == [0]
                    assert int(row[1] - earlier[1]) == OPTIONS.n_action_steps
                    n_found += 1
    assert n_found > 5
    assert {len(each) for each in next(own.batches(50)).values()} == {50}
    own.close()


def test_mistakes_are_named(model):
    with pytest.raises(ValueError, match="needs vectors, one for each token"):
        source(sites="vlm.blocks.0.attn.hook_pattern")
    with pytest.raises(ValueError, match="unknown task 'swim'"):
        source(tasks=["walk", "swim"])
    with pytest.raises(ValueError, match=r"one forward pass brings \d+ rows, but a block"):
        next(source(buffer_rows=64).batches(10))
    state = source().state_dict()
    with pytest.raises(ValueError, match="suite 'toy' instead of 'other'"):
        RolloutSource(model, toy_suite(name="other"), SITES, 5, None, 8192, options=OPTIONS).load_state_dict(state)
    # as many episodes side by side decide which rows come together
    with pytest.raises(ValueError, match="settings .*'n_envs': 3"):
        source(options=replace(OPTIONS, n_envs=2)).load_state_dict(state)
    with pytest.raises(ValueError, match="tasks"):
        source(tasks=["walk"]).load_state_dict(state)
    with pytest.raises(ValueError, match="capacity 8192 instead of 16384"):
        source(buffer_rows=16384).load_state_dict(state)


def test_segments_that_never_come_are_not_waited_for():
    """An endless source would ask for episodes on and on."""
    made = source(sites=Capture(EXPERT, segments=("language",)))
    with pytest.raises(ValueError, match=r"nothing of \['expert.* came in a whole group .* \['language'\]"):
        next(made.batches(10))
    made.close()


def test_a_store_trains_as_a_source(store):
    batch = next(StoreSource(store, [VLM, EXPERT], seed=0).batches(64))
    assert batch[VLM].shape == (64, store.widths[VLM]) and len(IDS) == store.ids(VLM).shape[1]
