"""Experiments as data: definitions are read strictly, runs go on where they stopped, reports hold what was measured."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment, list_experiments, read_definition
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.experiments.publish import publish, read_verdicts
from hooked_vla.rollouts.experiments.report import report
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource

TOML = """
id = "T1"
title = "A toy"
question = "Does it run?"
published = "Nobody claims anything."
kind = "toy"
models = ["act-tabletop"]
[settings]
episodes = 4
suites = ["object"]
[quick]
episodes = 2
[[rules]]
id = "acts"
text = "Success is at least 0.5"
threshold = 0.5
"""


@dataclass(frozen=True)
class Settings:
    episodes: int
    suites: tuple[str, ...] = ("object",)


def run(context: Context, settings: Settings) -> Outcome:
    suite = settings.suites[0]
    table = context.rollouts("baseline", suite, episodes=settings.episodes).episodes.to_pandas()
    starts = context.table("starts", lambda: pd.DataFrame({"task": [s.task for s in context.observations(suite, 3)]}))
    share, rule = float(table["success"].mean()), context.rules["acts"]
    figure, axes = plt.subplots()
    axes.bar(["success"], [share])
    main = pd.DataFrame({"suite": [suite], "success": [share], "nothing": [np.nan], "pipe": ["a|b"]})
    return Outcome(
        main,
        [Verdict("acts", share >= (rule.threshold or 0), f"{share:.0%}")],
        {"starts": starts},
        {"success": (figure, "Success")},
        labels=["replay: nothing, it is a toy"],
        notes=["one suite only"],
    )


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = "hooked_vla.rollouts.experiments.kinds.toy"
    module = ModuleType(name)
    module.Settings, module.run = Settings, run
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("episodes = 4", "episodes = '4'", "'episodes' must be int, got '4'"),
        ("episodes = 4", "episods = 4", r"settings \['episods'\] are unknown to 'toy'"),
        ("episodes = 4", "", r"settings \['episodes'\] are missing"),
        ("episodes = 2", "episodes = 2.5", "'episodes' must be int, got 2.5"),
        ('suites = ["object"]', "suites = [1]", "'suites' must be"),
        ('kind = "toy"', 'kind = "toys"', "unknown kind 'toys'"),
        ('id = "T1"', "", r"entries \['id'\] are missing"),
        ('title = "A toy"', 'title = " "', "title must be a text that is not empty"),
        ("models = [", "model = [", r"unknown entries \['model'\]"),
        ('models = ["act-tabletop"]', "models = []", "models must be a list of names"),
        ("threshold = 0.5", "threshold = '0.5'", "threshold of rule 'acts' must be a number"),
        ("threshold = 0.5", "value = 0.5", "a rule has id, text and perhaps threshold"),
        ("[[rules]]", "[[rules]]\nid = 'acts'\ntext = 'twice'\n[[rules]]", "used more than once: .*acts"),
        ("[settings]", "[settings", "T is not TOML"),
    ],
)
def test_what_is_wrong_in_a_definition_is_named(old: str, new: str, message: str) -> None:
    assert old in TOML
    with pytest.raises(ValueError, match=message):
        read_definition(TOML.replace(old, new), "T")


def test_quick_settings_replace_the_others() -> None:
    definition = read_definition(TOML, "T")
    assert definition.settle(False) == Settings(4, ("object",))
    assert definition.settle(True) == Settings(2, ("object",))


def test_an_unknown_experiment_is_answered_with_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no experiment 'E0'; there are E"):
        find_experiment("E0")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_experiment("none.toml")


def test_the_experiments_of_the_library_are_whole() -> None:
    found = list_experiments()
    assert found and all(name == each.id for name, each in found.items())
    for each in found.values():
        assert each.rules, each.id
        assert hasattr(each.module, "run") and each.settle(quick=True) != each.settle(quick=False), each.id


def test_a_run_leaves_its_results_and_goes_on_where_it_stopped(tmp_path) -> None:
    definition = read_definition(TOML, "T")
    first = run_experiment(definition, tmp_path / "a", quick=True)
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {"experiment.json", "figures/success.png", "report.md", "results.parquet", "tables/starts.parquet",
            "verdicts.json"} <= set(files)  # fmt: skip
    text = (tmp_path / "a" / "report.md").read_text()
    assert "# T1: A toy (act-tabletop)" in text and "A quick run" in text and "replay: nothing" in text
    assert "| Success is at least 0.5 | 100% | holds |" in text and "a\\|b" in text and "nan" not in text
    assert json.loads((tmp_path / "a" / "verdicts.json").read_text())["verdicts"]["acts"]["holds"] is True
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a" / "results.parquet"), first.main)

    bytes_before = {name: (tmp_path / "a" / name).read_bytes() for name in files}
    (tmp_path / "a" / "rollouts/baseline/episodes/000/000000001.parquet").unlink()
    (tmp_path / "a" / "report.md").unlink()
    run_experiment(definition, tmp_path / "a", quick=True)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files} == bytes_before

    with pytest.raises(ValueError, match=r"holds another run: .*quick: True recorded, False now"):
        run_experiment(definition, tmp_path / "a")


def test_a_folder_with_something_else_is_left_alone(tmp_path) -> None:
    definition = read_definition(TOML, "T")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds \['mine.txt'\]"):
        run_experiment(definition, tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match=r"experiment.json is damaged"):
        run_experiment(definition, broken, quick=True)


def test_every_rule_needs_a_verdict() -> None:
    definition = read_definition(TOML, "T")
    outcome = Outcome(pd.DataFrame(), [])
    with pytest.raises(ValueError, match=r"verdicts are on \[\], but the rules are \['acts'\]"):
        outcome.check(definition.rules)


def test_long_tables_are_cut_and_what_was_not_judged_is_said(tmp_path) -> None:
    definition = read_definition(TOML, "T")
    context = Context(definition, ModelSource("act-tabletop"), tmp_path)
    main = pd.DataFrame({"x": np.arange(70), "y": np.linspace(0, 1, 70)})
    text = report(context, Outcome(main, [Verdict("acts", None, "the baseline fails too")]))
    assert "10 more rows in `results.parquet`" in text and "| the baseline fails too | not judged |" in text


def test_the_command_lists_and_runs(tmp_path) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    listed = runner.invoke(app, ["experiment", "list"])
    assert listed.exit_code == 0 and all(name in listed.output for name in list_experiments())
    (tmp_path / "t.toml").write_text(TOML)
    done = runner.invoke(app, ["experiment", "run", str(tmp_path / "t.toml"), "--quick", "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert "acts: holds: 100%" in done.output and (tmp_path / "o" / "report.md").is_file()
    wrong = runner.invoke(app, ["experiment", "run", "E0"])
    assert wrong.exit_code == 2 and "no experiment 'E0'" in wrong.output


def test_a_finished_run_is_published_without_its_episodes(tmp_path) -> None:
    definition = read_definition(TOML.replace("episodes = 4", "episodes = 1"), "T")
    run_experiment(definition, tmp_path / "full")
    target = publish(tmp_path / "full", tmp_path / "results")
    assert target == tmp_path / "results" / "T1" / "act-tabletop"
    assert {path.name for path in target.iterdir()} == {
        "experiment.json", "figures", "report.md", "results.parquet", "tables", "verdicts.json",
    }  # fmt: skip
    (target / "old.txt").write_text("of an earlier run")
    assert not (publish(tmp_path / "full", tmp_path / "results") / "old.txt").exists()
    assert read_verdicts(tmp_path / "results")["T1", "act-tabletop"]["verdicts"]["acts"]["holds"] is True

    run_experiment(definition, tmp_path / "quick", quick=True)
    with pytest.raises(ValueError, match="is a quick run"):
        publish(tmp_path / "quick", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="not a finished run.*it has no experiment.json"):
        publish(tmp_path, tmp_path / "results")
