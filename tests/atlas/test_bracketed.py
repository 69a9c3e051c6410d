"""Folders whose names look like patterns of paths are read as they are called, and lead to no other."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from feature_runs import feature_run

from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import episodes, experiments, features
from hooked_vla.atlas.views.episode_index import EpisodeIndex
from hooked_vla.rollouts.sae.duck import confined, exactly

# patterns that others' names fit, and what could be a partition of a table
NAMES = ("a[1]", "a1", "b*", "bb", "c?", "cc", "d]", "k=3")
Open = Callable[[Path], Run]


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Open]:
    """In a cache whose name is a pattern as well."""
    runs: list[Run] = []

    def opened(folder: Path) -> Run:
        runs.append(Run.open(folder, cache=tmp_path / "cache[2]"))
        return runs[-1]

    yield opened
    for run in runs:
        run.close()


@pytest.mark.parametrize("root", ["RUN", "RUN[1]"])
def test_every_table_is_that_of_its_own_folder(open_run: Open, tmp_path: Path, root: str) -> None:
    for i, name in enumerate(NAMES):
        folder = tmp_path / root / name
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text("{}")
        # as many rows as its number says, so that counts are its own too
        rows = {"arm": [f"{name} {j % 2}" for j in range(4 * i + 4)], "dose": [j // 2 for j in range(4 * i + 4)]}
        pd.DataFrame(rows | {"success": 0.5}).to_parquet(folder / "results.parquet")
    # what the root's name fits as a pattern is there too
    shutil.copytree(tmp_path / root, tmp_path / "RUN1")
    run = open_run(tmp_path / root)
    found = {each.path.name: key for key, each in run.experiments.items()}
    assert set(found) == set(NAMES)
    for i, name in enumerate(NAMES):
        n = 4 * i + 4
        about = experiments.table(run, found[name], "results")
        assert (about["error"], about["total"]) == (None, n)
        (listed,) = experiments.experiment(run, found[name])["tables"]
        assert listed["total"] == n
        page = experiments.table_page(run, found[name], "results", "0")
        assert page["total"] == n and {row[0] for row in page["rows"]} == {f"{name} 0", f"{name} 1"}
        assert [each["name"] for each in about["columns"]] == ["arm", "dose", "success"]
        at = {each["name"]: str(j) for j, each in enumerate(about["columns"])}
        cells = experiments.heat_map(run, found[name], "results", at["success"], at["dose"], at["arm"])
        assert set(cells["columns"]) == {f"{name} 0", f"{name} 1"} and len(cells["cells"]) == n


def test_episodes_of_such_folders_are_read(run: Run, open_run: Open, tmp_path: Path) -> None:
    shutil.copytree(run.root / "E4" / "rollouts" / "rerun", tmp_path / "RUN[1]" / "a[1]")
    shutil.copytree(tmp_path / "RUN[1]" / "a[1]", tmp_path / "RUN1" / "a1")
    found = open_run(tmp_path / "RUN[1]")
    (key,) = found.rollouts
    assert EpisodeIndex.of(found, key).wait().ready
    page = episodes.get_page(found, key, "1")
    assert page["indexed"] and page["rows"] and not any(row["damage"] for row in page["rows"])
    assert episodes.get_rollout(found, key)["n"] == page["n"] and episodes.get_rollout(found, key)["rates"]
    assert episodes.find_episodes(found, key, arm="baseline")["n"] == page["n"]
    shown = episodes.get_episode(found, key, str(page["rows"][0]["episode"]))
    assert shown["steps"]["n"] == page["rows"][0]["n_steps"] and shown["cell"]


def test_an_index_of_features_in_such_a_folder_is_read(
    open_run: Open, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made, _ = feature_run(tmp_path_factory)
    shutil.copytree(made / "vlm", tmp_path / "RUN[1]" / "vlm[1]")
    found = open_run(tmp_path / "RUN[1]")
    (key,) = found.indexes
    densest = features.find_features(found, key, sort="density")["rows"][0]["feature"]
    page = features.get_feature(found, key, str(densest))
    assert max(value for each in page["plans"]["top"][0]["maps"] for row in each["values"] for value in row) > 0


def test_a_name_is_no_way_out_of_the_folders_that_may_be_read(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        (tmp_path / name).mkdir()
        pd.DataFrame({"of": [name]}).to_parquet(tmp_path / name / "t.parquet")
    with confined([tmp_path / "a[1]"], "100MB", threads=1) as duck:
        asked = "SELECT of FROM read_parquet(?)"
        assert duck.execute(asked, [exactly(tmp_path / "a[1]" / "t.parquet")]).fetchall() == [("a[1]",)]
        # the second as it is written: a pattern
        for path in (exactly(tmp_path / "a1" / "t.parquet"), str(tmp_path / "a[1]" / "t.parquet")):
            with pytest.raises(duckdb.Error):
                duck.execute(asked, [path])
