"""From a row to the episodes that it was measured on: their success is the row's."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import episodes, experiments
from hooked_vla.atlas.views.measured_on import measured_on
from hooked_vla.rollouts.records import read_episodes


def test_the_episodes_of_an_arm_have_the_success_of_its_row(run: Run) -> None:
    page = experiments.table_page(run, "E4", "results", "0")
    frame = pd.DataFrame(page["rows"], columns=page["columns"])
    assert len(page["episodes"]) == len(frame) == frame["arm"].nunique()
    for held, row in zip(page["episodes"], frame.to_dict("records"), strict=True):
        again = row["arm"] == "rerun"
        assert held["rollout"] == f"E4--rollouts--{'rerun' if again else 'main'}"
        assert held["arm"] == ("baseline" if again else row["arm"]) and held["episode"] is None
        recorded = read_episodes(run.root / held["path"]).to_pandas()
        mine = recorded[recorded["arm"] == held["arm"]]
        assert (len(mine), mine["success"].mean()) == (row["n"], row["success"]) and held["n"] == row["n"]
        # and the list that the page links to is of these
        rows = episodes.find_episodes(run, held["rollout"], arm=held["arm"])["rows"]
        assert [each["episode"] for each in rows] == mine["episode"].tolist()


def test_a_row_of_one_episode_leads_to_that(run: Run) -> None:
    page = experiments.table_page(run, "E4", "episodes", "0")
    for held, values in zip(page["episodes"], page["rows"], strict=True):
        row = dict(zip(page["columns"], values, strict=True))
        (found,) = read_episodes(run.root / held["path"], [held["episode"]]).to_pylist()
        assert (found["task"], found["seed"], found["success"]) == (row["task"], row["seed"], row["success"])
        assert found["arm"] == ("baseline" if row["arm"] == "rerun" else row["arm"])


def test_chosen_rows_lead_to_the_same_episodes(run: Run) -> None:
    (held,) = experiments.rows(run, "E4", "results", '{"arm": "expert"}', "0")["episodes"]
    assert (held["arm"], held["path"]) == ("expert", "E4/rollouts/main")


@pytest.mark.parametrize(
    ("columns", "row", "arm"),
    [
        # another suite, a task or a seed that never ran, an arm that there is not, and what is of no arm
        (("suite", "arm"), ("object", "expert"), None),
        (("arm", "task"), ("expert", "no-such"), None),
        (("arm", "task", "seed"), ("expert", "red-orange", 1), None),
        (("arm",), ("no such",), None),
        (("site", "success"), ("vlm.blocks.0.hook_resid_post", 1.0), None),
        (("arm",), (None,), None),
        (("donor", "null", "site"), ("own", "noise", "expert"), "noise: expert"),
        (("donor", "null", "site"), ("noise", "empty", "expert"), "noise: expert"),
        (("donor", "null", "site"), ("other", "noise", "expert"), None),
    ],
)
def test_only_what_is_told_is_linked(
    run: Run, columns: tuple[str, ...], row: tuple[object, ...], arm: str | None
) -> None:
    (held,) = measured_on(run, run.experiments["E4"], "results", columns, [row])
    assert (held and held["arm"]) == arm


def test_a_table_called_after_a_folder_is_of_that(run: Run) -> None:
    for table, folder in (("own_values", "own"), ("results", "main")):
        (held,) = measured_on(run, run.experiments["E4"], table, ["arm"], [["baseline"]])
        assert held is not None and held["path"] == f"E4/rollouts/{folder}"


def test_without_rollouts_nothing_is_linked(run_folder: Path, tmp_path: Path) -> None:
    """As in results that were published, or whose manifest is damaged."""
    shutil.copytree(run_folder / "E4", tmp_path / "RUN" / "E4", ignore=shutil.ignore_patterns("recordings", "rollouts"))
    (tmp_path / "RUN" / "E4" / "rollouts" / "main").mkdir(parents=True)
    (tmp_path / "RUN" / "E4" / "rollouts" / "main" / "manifest.json").write_text('{"format": "hooked-vla rollouts 1"}')
    found = Run.open(tmp_path / "RUN", cache=tmp_path / "cache")
    page = experiments.table_page(found, "E4", "results", "0")
    assert page["rows"] and set(page["episodes"]) == {None}
    found.close()


def two_models(run_folder: Path, folder: Path, names: tuple[str, str]) -> Run:
    """E8's two halves, which have the same suite, arms and names of folders (rollouts/experiments/kinds/heads.py)."""
    shutil.copytree(run_folder / "E4", folder / "RUN" / "E8", ignore=shutil.ignore_patterns("recordings", "rollouts"))
    for half, name in zip((folder / "RUN" / "E8", folder / "RUN" / "E8" / "discrete"), names, strict=True):
        target = half / "rollouts" / "goal"
        shutil.copytree(run_folder / "E4" / "rollouts" / "main", target)
        manifest = json.loads((target / "manifest.json").read_text())
        manifest["model"]["name"] = name
        (target / "manifest.json").write_text(json.dumps(manifest))
    return Run.open(folder / "RUN", cache=folder / "cache")


def test_a_row_of_one_model_leads_to_its_episodes(run_folder: Path, tmp_path: Path) -> None:
    found = two_models(run_folder, tmp_path, ("continuous", "discrete"))
    rows = [["continuous", "expert"], ["discrete", "expert"], ["third", "expert"]]
    held = measured_on(found, found.experiments["E8"], "results", ["model", "arm"], rows)
    assert [each and each["path"] for each in held] == ["E8/rollouts/goal", "E8/discrete/rollouts/goal", None]
    # of one that does not say its model, either could be meant
    assert measured_on(found, found.experiments["E8"], "results", ["arm"], [["expert"]]) == [None]
    found.close()


def test_of_folders_that_fit_equally_none_is_meant(run_folder: Path, tmp_path: Path) -> None:
    found = two_models(run_folder, tmp_path, ("same", "same"))
    assert measured_on(found, found.experiments["E8"], "goal", ["model", "arm"], [["same", "expert"]]) == [None]
    found.close()
