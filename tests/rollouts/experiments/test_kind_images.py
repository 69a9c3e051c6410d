"""The image battery as an experiment: which changes are run, on which cameras, and how rules are judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_numbers import unknown_numbers

from hooked_vla.rollouts.batteries.images import IMAGE_KINDS
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import Definition, find_experiment
from hooked_vla.rollouts.experiments.kinds import images as kind
from hooked_vla.rollouts.experiments.kinds.battery_runs import few_tasks
from hooked_vla.rollouts.experiments.kinds.images import Settings
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options


def small(**settings) -> Definition:
    """E17 with few of its kinds, on one suite."""
    shared = {"episodes": 1, "suites": ["object"]}
    return replace(find_experiment("E17"), settings=shared | settings, quick={})


def test_a_run_judges_its_rules_and_shows_its_pictures(tmp_path: Path) -> None:
    what = small(kinds=["contrast_down", "rotate_180", "blank"], max_steps=48)
    outcome = run_experiment(what, tmp_path, "smolvla-tabletop", options=Options(n_envs=4))
    main = outcome.main.set_index("arm")
    assert list(main.index) == ["baseline", "contrast_down", "rotate_180", "blank", "rerun"]
    assert main["success"].to_dict() == {
        "baseline": 1, "contrast_down": 1, "rotate_180": 0, "blank": 0, "rerun": 1
    }  # fmt: skip
    # one task has no interval, and decides nothing
    assert [each.holds for each in outcome.verdicts] == [None, None]
    assert "median change +0.0 pp" in outcome.verdicts[0].measured
    assert "median change -100.0 pp" in outcome.verdicts[1].measured
    assert unknown_numbers(tmp_path, what) == []
    reach = outcome.tables["reach"].set_index("arm")
    assert reach["status"].tolist() == ["changed"] * 3 and reach.loc["blank", "pixels"] > 0.9
    pictures = np.asarray(Image.open(tmp_path / "figures" / "pictures.png").convert("RGB"))
    # colours of the scene are there, four times
    assert (np.ptp(pictures.astype(int), axis=-1) > 100).mean() > 0.01


def test_strengths_are_arms_of_their_own_and_a_change_without_effect_is_not_run(tmp_path: Path) -> None:
    # a strength that posterises to all 8 bits changes nothing
    what = small(kinds=["posterize", "blank"], strengths=[0.05, 1.0], max_steps=4, cameras=["top"])
    outcome = run_experiment(what, tmp_path, "smolvla-tabletop", options=Options(n_envs=4))
    assert outcome.main["arm"].tolist() == ["baseline", "posterize", "blank", "rerun"]
    reach = outcome.tables["reach"].set_index("arm")
    assert reach.loc["posterize x0.05", ["status", "pixels"]].tolist() == ["unchanged: not run", 0]
    assert outcome.labels[0].startswith("no pixel changed: posterize x0.05 (object).")
    # one camera of two
    assert reach.loc["blank", "pixels"] == pytest.approx(0.5, abs=0.05)
    # the baseline fails in 4 steps
    assert [each.holds for each in outcome.verdicts] == [None, None]


def runs(suite: str, arms: dict[str, float], baseline: float = 1.0) -> tuple[pd.DataFrame, Runs]:
    """Thirty episodes of three tasks under each arm, of which the first ones succeed; and the rows of a comparison."""
    rows, table = [], []
    for arm, share in {"baseline": baseline, **arms}.items():
        rows += [{"suite": suite, "arm": arm, "task": f"t{i % 3}", "seed": i, "success": i < 30 * share}
                 for i in range(30)]  # fmt: skip
        group = "geometric" if arm.startswith("rotate") else "photometric"
        table.append({"suite": suite, "arm": arm, "group": group, "strength": 1.0, "success": share,
                      "difference": share - baseline, "holm_p": 1.0})  # fmt: skip
    one = [np.zeros((1, 4))] * len(rows)
    return pd.DataFrame(table), Runs(pd.DataFrame(rows), one, one, one)


def costs(tmp_path: Path, *suites: tuple[pd.DataFrame, Runs]) -> list[bool | None]:
    context = Context(find_experiment("E17"), ModelSource("smolvla-tabletop"), tmp_path)
    table = pd.concat([each[0] for each in suites])
    by_suite = {str(each[0]["suite"].iloc[0]): each[1] for each in suites}
    rules = (("photometric-tolerated", "photometric", True), ("geometric-fatal", "geometric", False))
    return [kind._cost(context, table, by_suite, *rule).holds for rule in rules]


def test_a_suite_that_cannot_be_judged_leaves_the_rule_open(tmp_path: Path) -> None:
    fine = runs("goal", {"hue": 1.0, "rotate_10": 0.0})
    assert costs(tmp_path, fine) == [True, True]
    # the baseline fails there: "in every suite" cannot be said
    floor = runs("object", {"hue": 0.5, "rotate_10": 0.0}, baseline=0.5)
    assert costs(tmp_path, fine, floor) == [None, None]
    # but one suite is enough to contradict it
    assert costs(tmp_path, runs("goal", {"hue": 0.0, "rotate_10": 1.0}), floor) == [False, False]


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown kinds \['melt'\] of image changes"):
        Settings(1, kinds=("melt",))
    with pytest.raises(ValueError, match=r"strengths must have 1, at which the rules are judged; got \[0.5\]"):
        Settings(1, strengths=(0.5,))
    with pytest.raises(ValueError, match=r"does not see the cameras \['agent'\]; it sees \['top', 'wrist'\]"):
        run_experiment(small(cameras=["agent"], kinds=["blank"]), tmp_path, "smolvla-tabletop")


def test_every_kind_is_an_arm_and_those_without_degrees_are_run_at_1_only() -> None:
    settings = Settings(1, strengths=(0.5, 1.0))
    arms = settings.arms()
    graded = sum(each.graded for each in IMAGE_KINDS.values())
    assert len(arms) == len(IMAGE_KINDS) + graded and len({arm.name for arm in arms}) == len(arms)
    assert len(Settings(1).arms()) == 24 and find_experiment("E17").settle(False).episodes >= 30


def test_a_policy_without_words_acts_where_the_scene_shows_the_task(tmp_path: Path) -> None:
    for name, words in (("act-tabletop", False), ("smolvla-tabletop", True)):
        assert Context(find_experiment("E17"), ModelSource(name), tmp_path).reads_words is words
    for quick in (False, True):
        assert "goal" not in find_experiment("E17").settle(quick).wordless_suites


def test_few_tasks_are_said_to_make_intervals_narrow() -> None:
    table = pd.DataFrame({"suite": ["object", "object", "goal"], "n_tasks": [4, 4, 12]})
    [note] = few_tasks(table)
    assert "the 4 tasks of object" in note
