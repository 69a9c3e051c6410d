"""Queries of the features view: against the index, the replay and the steering run; damaged and hostile folders."""

import io
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_runs import EXPERT, HOSTILE, MODEL, N_FEATURES, SITE, STEERED, describe_all, feature_run
from PIL import Image

from hooked_vla.atlas import export, projections
from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import feature_map, feature_pictures, features
from hooked_vla.atlas.views.opened_index import open_index
from hooked_vla.atlas.worker import Worker, WorkError
from hooked_vla.rollouts.replay import replay
from hooked_vla.sae.descriptions import LIFT, SHARE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return feature_run(tmp_path_factory)


@pytest.fixture(scope="module")
def opened(made, tmp_path_factory):
    run = Run.open(made[0], cache=tmp_path_factory.mktemp("cache"))
    yield run
    run.close()


@pytest.fixture
def copied(made, tmp_path):
    """A copy to spoil, and a way to open it."""
    shutil.copytree(made[0], tmp_path / "RUN")
    runs = []

    def open_copy() -> Run:
        runs.append(Run.open(tmp_path / "RUN", cache=tmp_path / "cache"))
        return runs[-1]

    yield tmp_path / "RUN", open_copy
    for run in runs:
        run.close()


def test_every_index_is_listed_with_what_it_is_of(opened):
    listed = {row["key"]: row for row in features.list_indexes(opened)}
    assert {key: row["site"] for key, row in listed.items()} == {"vlm": SITE, "expert": EXPERT}
    about = features.get_index(opened, "vlm")
    index = open_index(opened, "vlm")
    table = index.features()
    assert about["counts"]["features"] == N_FEATURES and about["counts"]["episodes"] == 4
    assert about["counts"]["alive"] == (table["density"] > 0).sum()
    assert about["counts"]["general"] == (table["general"] >= features.THRESHOLD).sum()
    assert about["counts"]["rows"] == index.manifest["rows"] and about["model"] == MODEL
    assert about["projections"] == {"pca": "ready", "umap": "too few features"}
    assert opened.rollouts[about["rollouts"]].path == opened.root / "activations" / "rollouts"


def test_columns_hold_every_feature_and_the_label_that_it_stands_out_by(opened):
    found, index = features.get_columns(opened, "vlm"), open_index(opened, "vlm")
    table = index.features().sort_values("feature")
    assert found["descriptions"] == table["description"].tolist()
    for name in ("density", "frames", "general", "maximum"):
        mine = [np.nan if each is None else each for each in found[name]]
        np.testing.assert_allclose(mine, table[name], rtol=1e-4)
    for feature in range(0, N_FEATURES, 7):
        shares = index.shares(feature)
        kept = shares[(shares["share"] >= SHARE) & (shares["lift"] >= LIFT)]
        for kind, labels in found["labels"].items():
            own = kept[kept["kind"] == kind]
            shown = labels["of"][feature]
            best = (
                set()
                if own.empty
                else set(own[own["share"] * own["lift"] == (own["share"] * own["lift"]).max()]["value"])
            )
            assert (shown == -1 and not best) or labels["names"][shown] in best
    places = features.get_map(opened, "vlm", "pca")
    expected = index.sql("SELECT x, y FROM directions ORDER BY feature")
    np.testing.assert_allclose(places["x"], expected["x"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(places["y"], expected["y"], rtol=1e-4, atol=1e-6)


def test_features_are_found_sorted_and_paged(opened, monkeypatch):
    monkeypatch.setattr(features, "PAGE", 15)
    pages = [features.find_features(opened, "vlm", sort="general", page=str(i)) for i in (1, 2, 3, 4)]
    assert [len(page["rows"]) for page in pages] == [15, 15, 10, 0] and {page["pages"] for page in pages} == {3}
    rows = [row for page in pages for row in page["rows"]]
    values = [row["general"] for row in rows if row["general"] is not None]
    assert len({row["feature"] for row in rows}) == N_FEATURES and values == sorted(values, reverse=True)
    assert all(row["general"] is None for row in rows[len(values) :])
    index = open_index(opened, "vlm")
    word = "segment"
    found = features.find_features(opened, "vlm", text=word)
    assert [row["feature"] for row in found["rows"]] == index.search(word, N_FEATURES)["feature"].tolist()[:15]
    by_density = features.find_features(opened, "vlm", text=word, sort="density")
    assert by_density["n"] == found["n"] > 0
    densities = [row["density"] for row in by_density["rows"]]
    assert densities == sorted(densities, reverse=True)
    assert features.find_features(opened, "vlm", text="17")["rows"][0]["feature"] == 17
    assert features.find_features(opened, "vlm", text="'; -- \"")["n"] == 0
    with pytest.raises(ValueError, match="sorted by"):
        features.find_features(opened, "vlm", sort="density; DROP TABLE features")


def test_a_page_of_a_feature_agrees_with_the_index(opened):
    index = open_index(opened, "vlm")
    feature = int(index.features("density")["feature"].iat[0])
    page = features.get_feature(opened, "vlm", str(feature))
    assert sum(page["histogram"]["counts"]) == round(page["density"] * index.manifest["rows"])
    assert page["rank"]["density"] == 0
    top = index.top_frames(feature, features.PLANS, per_episode=1)
    assert [plan["env_step"] for plan in page["plans"]["top"]] == top["env_step"].tolist()
    for plan in [*page["plans"]["top"], *page["plans"]["across"]]:
        shown = max(value for each in plan["maps"] for row in each["values"] for value in row)
        assert shown == pytest.approx(plan["maximum"], rel=1e-4)
        asked = features.get_plan(opened, "vlm", str(feature), str(plan["episode"]), str(plan["env_step"]))
        assert asked["maps"] == plan["maps"]
    maxima = [plan["maximum"] for plan in page["plans"]["across"]]
    assert maxima == sorted(maxima, reverse=True) and [plan["share"] for plan in page["plans"]["across"]] == [
        0.25,
        0.5,
        0.75,
    ]
    for episode in page["episodes"]:
        assert max(episode["course"]["values"]) == pytest.approx(episode["maximum"], rel=1e-4)
        assert episode["course"]["steps"][0] == 0 and len(episode["course"]["phases"]) == len(
            episode["course"]["steps"]
        )
    assert [row["neighbour"] for row in page["neighbours"]["decoder"]] == index.neighbours(feature)[
        "neighbour"
    ].tolist()


def test_pictures_are_what_the_policy_saw(opened):
    about = feature_pictures.get_pictures(opened, "vlm", "1")
    (episode,) = replay(opened.root / "activations" / "rollouts", [1])
    assert about["error"] is None and about["cameras"] == list(episode.images)
    for i, camera in enumerate(about["cameras"]):
        step = about["steps"][-1]
        media = feature_pictures.get_picture(opened, "vlm", "1", str(step), str(i))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(media.content))), episode.images[camera][step])
    grids = feature_pictures.get_grids(opened, "vlm")["grids"]
    maps = {each["camera"]: each for each in features.get_feature(opened, "vlm", "0")["plans"]["top"][0]["maps"]}
    for grid in grids:
        assert sorted(grid["order"]) == list(range(grid["grid"][0] * grid["grid"][1]))
        assert len(maps[grid["camera"]]["positions"]) == grid["n_before"] + len(grid["order"])
        assert grid["source"] in about["cameras"] and grid["rows"][0][0] == 0 and grid["columns"][-1][1] == 1
    for step, camera in (("1", "0"), ("0", "9")):
        with pytest.raises(NotThere, match="no picture"):
            feature_pictures.get_picture(opened, "vlm", "1", step, camera)


def test_without_the_episodes_there_are_no_pictures(copied):
    folder, open_copy = copied
    shutil.rmtree(folder / "activations")
    run = open_copy()
    assert features.get_index(run, "vlm")["rollouts"] is None
    assert "not in this run" in feature_pictures.get_pictures(run, "vlm", "1")["error"]
    assert "not in this run" in feature_pictures.get_grids(run, "vlm")["error"]


def test_doses_are_those_of_the_steering_run(opened, made):
    _, steered = made
    (found,) = features.get_steering(opened, "expert", str(STEERED))
    assert found["error"] is None and found["suite"] == "goal"
    rows = {row["arm"]: row for row in found["rows"]}
    assert {(row["direction"], row["rho"]) for row in found["rows"]} == {
        ("baseline", None), ("sham", 0.0), *((name, rho) for name in ("feature", "random 0") for rho in (-0.5, 0.5))
    }  # fmt: skip
    for row in steered.table.to_dict("records"):
        mine = rows[row["arm"]]
        assert mine["success"] == row["success"] and mine["displacement"] == pytest.approx(row["displacement"])
        for axis in range(3):
            shift = steered.shift(row["arm"], axis)
            assert mine["shift"][axis]["mean"] == pytest.approx(shift.mean(), abs=1e-9)
            assert mine["shift"][axis]["low"] <= shift.mean() + 1e-12
    assert rows["sham"]["shift"][0]["mean"] == 0 and abs(rows["feature +0.5"]["shift"][0]["mean"]) > 0
    assert features.get_steering(opened, "expert", "0") == [] == features.get_steering(opened, "vlm", str(STEERED))


def test_umap_is_made_once_of_the_features_in_order(tmp_path, monkeypatch):
    """The placing itself is umap-learn's."""
    asked = []

    class Umap:
        def __init__(self, **settings):
            asked.append(settings)

        def fit_transform(self, rows):
            assert np.isfinite(rows).all() and (np.abs(rows).sum(1) > 0).all()
            return rows[:, :2] * 10

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 0.0, 0.0]]
    table = pa.table({"feature": pa.array([1, 0, 2], pa.int32()), "components": rows})
    pq.write_table(table, tmp_path / "d.parquet")
    out = tmp_path / "deep" / "m.npy"
    projections.umap({"table": str(tmp_path / "d.parquet"), "out": str(out)}, print, lambda: False)
    np.testing.assert_array_equal(np.load(out)[:2], [[40, 50], [10, 20]])
    assert asked[0]["metric"] == "cosine" and asked[0]["random_state"] == 0 and len(list(out.parent.iterdir())) == 1


def test_an_index_offers_umap_where_it_can_be_made(opened, monkeypatch):
    index = open_index(opened, "vlm")
    monkeypatch.setattr(feature_map, "MIN_FEATURES", 10)
    monkeypatch.setattr(feature_map, "find_spec", lambda name: None)
    assert feature_map.projections_of(opened, index)["umap"] == "umap-learn is not installed"
    with pytest.raises(NotThere, match="umap-learn is not installed"):
        features.get_map(opened, "vlm", "umap")
    monkeypatch.setattr(feature_map, "find_spec", lambda name: object())
    assert feature_map.projections_of(opened, index)["umap"] == "to be made"
    file = feature_map._file(opened, index)
    file.parent.mkdir(parents=True)
    np.save(file, np.ones((N_FEATURES, 2), np.float32))
    assert features.get_map(opened, "vlm", "umap") == {"x": [1.0] * N_FEATURES, "y": [1.0] * N_FEATURES}
    file.unlink()
    with pytest.raises(NotThere, match="there is no map"):
        features.get_map(opened, "vlm", "tsne")


def test_what_is_not_there_is_said(opened, make_client):
    client = make_client(opened, live=False)
    for path, said in (
        ("features/nothing", "no feature index 'nothing'"),
        ("features/vlm/feature/40", "no feature 40"),
        ("features/vlm/feature/-1", "no number of a feature"),
        ("features/vlm/feature/..%2F..%2Fetc", ""),
        ("features/vlm/feature/3/plan/0/3", "no plan at episode 0"),
        ("features/vlm/feature/3/plan/77/0", "no episodes [77]"),
        ("features/vlm/pictures/77", "no episode 77"),
    ):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 404 and said in answer.json()["error"], (path, answer.text)
    assert client.get("/api/features/vlm/find", params={"sort": "x"}).status_code == 400
    assert client.get("/api/features/vlm/find", params={"text": "segment"}).json()["n"] > 0


def test_damaged_and_hostile_folders_are_told_and_nothing_else(copied, make_client, tmp_path):
    folder, open_copy = copied
    outside = tmp_path / "outside.parquet"
    shutil.copy(folder / "vlm" / "shares.parquet", outside)
    (folder / "vlm" / "shares.parquet").unlink()
    (folder / "vlm" / "shares.parquet").symlink_to(outside)
    shutil.copytree(folder / "expert", folder / "damaged")
    (folder / "damaged" / "peaks.parquet").write_bytes(b"PAR1 not at all")
    shutil.copytree(folder / "expert", folder / "older")
    (folder / "older" / "manifest.json").write_text('{"format": "hooked-vla feature index 1"}')
    (folder / "steered" / "steered.csv").write_text("arm\nfeature +0.5\n")
    client = make_client(open_copy(), live=False)
    listed = {row["key"]: row["error"] for row in client.get("/api/features").json()}
    assert "holds links" in listed["vlm"] and "is not of the format" in listed["older"] and listed["expert"] is None
    for path in (
        "features/vlm",
        "features/vlm/columns",
        "features/older",
        "features/damaged",
        "features/damaged/feature/1",
    ):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 404 and str(tmp_path) not in answer.text, answer.text
    assert client.get("/api/features/expert").status_code == 200
    (row,) = client.get(f"/api/features/expert/feature/{STEERED}/steering").json()[0]["rows"]
    assert row["arm"] == "feature +0.5" and row["success"] is None


def test_a_copy_holds_what_the_page_asks_for(copied, tmp_path, monkeypatch):
    folder, open_copy = copied
    describe_all(folder / "vlm", HOSTILE)
    monkeypatch.setattr(features, "EXPORTED", 3)
    monkeypatch.setattr(feature_pictures, "EXPORTED_EPISODES", 1)
    # films of all episodes are another view's
    monkeypatch.setattr(export, "all_routes", lambda live: [*features.ROUTES, *feature_pictures.ROUTES])
    assert not export.export_run(open_copy(), tmp_path / "PAGE").errors
    data = tmp_path / "PAGE" / "data" / "features"
    for key in ("vlm", "expert"):
        assert {"columns.js", "grids.js", "map", "feature", "pictures", "picture"} <= {
            each.name for each in (data / key).iterdir()
        }
        assert len(list((data / key / "feature").glob("*.js"))) == 3 and not (data / key / "map" / "umap.js").exists()
        assert list((data / key / "picture").rglob("*.png"))
    # what was steered is among them
    assert (data / "expert" / "feature" / f"{STEERED}.js").is_file()
    assert "<script" not in (data / "vlm" / "columns.js").read_text()


def test_a_copy_without_replays_asks_no_worker(copied, tmp_path, monkeypatch):
    _, open_copy = copied
    asked = []

    def run(self, task, *_):
        asked.append(task)
        raise WorkError("asked")

    monkeypatch.setattr(Worker, "run", run)
    monkeypatch.setattr(features, "EXPORTED", 3)
    opened = open_copy()
    # there is something to replay
    assert opened.rollouts and features.get_index(opened, "vlm")["rollouts"] is not None
    export.export_run(opened, tmp_path / "PAGE", replays=False)
    assert asked == [] and (tmp_path / "PAGE" / "data" / "features" / "vlm" / "columns.js").is_file()


def test_grids_and_pictures_are_of_the_run_that_is_there_now(copied, monkeypatch):
    folder, open_copy = copied
    opened, asked = open_copy(), []

    def run(self, task, arguments, *_):
        asked.append(task)
        if "out" in arguments:
            Path(arguments["out"]).mkdir(parents=True)
            (Path(arguments["out"]) / "pictures.json").write_text('{"cameras": [], "steps": []}')
        return [f"grid {len(asked)}"]

    monkeypatch.setattr(Worker, "run", run)
    manifest = folder / "activations" / "rollouts" / "manifest.json"
    told = manifest.stat()

    def look():
        feature_pictures.get_pictures(opened, "vlm", "1")
        return feature_pictures.get_grids(opened, "vlm")["grids"]

    assert look() == look() == ["grid 2"] and asked == ["pictures", "grids"]
    # another time, then another size at the same time
    os.utime(manifest, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    assert look() == ["grid 4"]
    manifest.write_text(manifest.read_text() + "\n")
    os.utime(manifest, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    assert look() == ["grid 6"]
