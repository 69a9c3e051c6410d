"""No number is invented, and none is typed into the source: what is missing is missing, what is said was measured."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from report_numbers import unknown_numbers

import hooked_vla
from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.rollouts.experiments.compare import Runs, by_task, compare, join, layout_of, mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import Definition, Rule, find_experiment
from hooked_vla.rollouts.experiments.figures import new_figure, success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import changes, gate_note
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.experiments.report import report, write_outcome
from hooked_vla.rollouts.jobs import ModelSource

PACKAGE = Path(hooked_vla.__file__).parent
REPOSITORY = PACKAGE.parent


@dataclass(frozen=True)
class Settings:
    episodes: int = 7


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> Definition:
    name = "hooked_vla.rollouts.experiments.kinds.numbers"
    module = ModuleType(name)
    module.Settings, module.run = Settings, None
    monkeypatch.setitem(sys.modules, name, module)
    rules = (Rule("works", "Success is at least 0.5", 0.5),)
    return Definition("T2", "A toy", "Does it?", "84.5 % (arXiv 2603.19233).", "numbers", ("act-tabletop",),
                      {"episodes": 7}, {}, rules)  # fmt: skip


def runs(arm: str, successes: list[bool]) -> Runs:
    """Episodes of one arm, of tasks in turn, that stand still for two steps."""
    n = len(successes)
    episodes = pd.DataFrame({"suite": "goal", "arm": arm, "task": [f"t{i % 3}" for i in range(n)],
                             "seed": [i // 3 for i in range(n)], "success": successes})  # fmt: skip
    return Runs(episodes, [np.zeros((3, 4), np.float32)] * n, [np.zeros((2, 4), np.float32)] * n,
                [np.zeros(2, np.int64)] * n)  # fmt: skip


# A success rate is not invented where data are missing.


def test_no_episodes_have_no_success_rate() -> None:
    with pytest.raises(ValueError, match="no interval for 0 successes of 0"):
        wilson_interval(0, 0)
    assert all(np.isnan(each) for each in mean_with_interval([], []))
    table = by_task(runs("baseline", [True, False]))
    # the third task was never run: it has no row, not one of 0 %
    assert table["task"].tolist() == ["t0", "t1"] and table["n"].tolist() == [1, 1]


def test_an_arm_or_partner_that_is_missing_is_an_error_and_not_a_failure() -> None:
    base, arm = runs("baseline", [True] * 3), runs("arm", [True] * 6)
    layout, same = layout_of("goal"), torch.as_tensor
    with pytest.raises(ValueError, match=r"arm 'arm' has the episode .*'t0', 1\), but the arm 'baseline' has not"):
        compare(join(base, arm), layout, same, floor=None)
    with pytest.raises(ValueError, match=r"no episodes of the arm 'rerun' in the suites \['goal'\]"):
        compare(base, layout, same)
    with pytest.raises(KeyError):
        changes(join(runs("baseline", [True] * 6), runs("arm", [True] * 3)), "goal", ["arm"])
    with pytest.raises(StopIteration):
        gate_note(pd.DataFrame([{"suite": "goal", "arm": "arm", "success": 1.0}]), "goal")


def test_what_was_not_measured_is_blank_in_report_and_figure(tmp_path: Path, definition: Definition) -> None:
    nan = float("nan")
    main = pd.DataFrame({"suite": ["goal"] * 2, "arm": ["a", "b"], "n": [4, 0], "success": [0.5, nan],
                         "success_low": [0.15, nan], "success_high": [0.85, nan]})  # fmt: skip
    context = Context(definition, ModelSource("act-tabletop"), tmp_path)
    text = report(context, Outcome(main, [Verdict("works", None, "b was not run")]))
    assert "| goal | b | 0 |  |  |  |" in text and "| b was not run | not judged |" in text and "nan" not in text
    widths = [bar.get_width() for bar in success_bars(main).axes[0].patches]
    assert widths[0] == 0.5 and np.isnan(widths[1])


# Numbers are not typed into the source.


def outcome(measured: str = "success 42 %", note: str = "7 episodes", caption: str = "0.625 m") -> Outcome:
    main = pd.DataFrame({"arm": ["a"], "success": [0.42], "way": [0.625]})
    return Outcome(main, [Verdict("works", False, measured)], {"more": pd.DataFrame({"x": [3.14159, np.nan]})},
                   {"f": (new_figure(1, 1), caption)}, notes=[note])  # fmt: skip


def write(folder: Path, definition: Definition, what: Outcome) -> list[str]:
    context = Context(definition, ModelSource("act-tabletop"), folder)
    context.claim()
    write_outcome(context, what)
    return unknown_numbers(folder, definition)


def test_every_number_of_a_report_is_in_its_tables_or_settings(tmp_path: Path, definition: Definition) -> None:
    assert write(tmp_path / "a", definition, outcome()) == []
    assert write(tmp_path / "n", definition, outcome(note="success was 73 %"))[0].startswith("['73'] in: - success was")
    assert write(tmp_path / "c", definition, outcome(caption="0.626 m"))
    # a cell, or what a rule came to, that is not what the files have
    for old, new in (("| a | 0.42 |", "| a | 0.43 |"), ("| success 42 % |", "| success 99.8 % |"), ("3.14", "3.2")):
        text = (tmp_path / "a" / "report.md").read_text()
        assert old in text
        (tmp_path / "a" / "report.md").write_text(text.replace(old, new))
        assert unknown_numbers(tmp_path / "a", definition), new
        (tmp_path / "a" / "report.md").write_text(text)


def test_published_reports_hold_what_their_tables_hold() -> None:
    """Verdicts and tables, cell by cell, and every number beside them."""
    found = sorted((REPOSITORY / "docs" / "results").glob("*/*/verdicts.json"))
    for path in found:
        about = json.loads(path.read_text())
        assert about["experiment"] == path.parent.parent.name
        assert unknown_numbers(path.parent, find_experiment(about["experiment"])) == [], path.parent


# none, one (no difference, chance, a dose), and the confidence of intervals; a percentile by which doses are counted
SAID = {"0", "1", "95", "99"}


def typed_numbers(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, number, text) of every number that is written into a sentence, where {} would put a measured one.

    Sentences are strings with a space, but docstrings, shapes of arrays, and what errors say.
    """
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        ours = None
        if isinstance(node, ast.Raise):
            ours = node
        elif isinstance(node, ast.FormattedValue):
            ours = node.format_spec
        elif isinstance(node, ast.Subscript):
            ours = node.slice
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            ours = node.value
        skipped |= set() if ours is None else {id(each) for each in ast.walk(ours)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            # digits inside of names (R2, arXiv:2603) are no figures
            numbers = re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", node.value) if " " in node.value else []
            for number in numbers:
                yield node.lineno, number, node.value


def typed_values(source: str) -> Iterator[tuple[int, str]]:
    """(line, code) where a number from the source stands in for a measured one: a default of `get` that is a fraction,
    and a name in small letters that was given a number and is then said."""
    tree = ast.parse(source)
    given = {
        target.id
        for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_number(node.value)
        for target in node.targets if isinstance(target, ast.Name) and target.id.islower()
    }  # fmt: skip
    counted = {node.target.id for node in ast.walk(tree)
               if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if len(node.args) == 2 and _is_number(node.args[1]) and ast.literal_eval(node.args[1]) % 1:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.FormattedValue):
            said = {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
            if said & (given - counted):
                yield node.lineno, ast.unparse(node)


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def test_no_number_of_the_source_stands_in_for_a_measured_one() -> None:
    planted = (
        'rate = 0.845\nsay(f"success {rate:.1%}")\nsay(row.get("success", 0.845))\nn = 0\nn += 1\n'
        'say(f"{n} of {LIMIT}", row.get("n", 0))\n'
    )
    assert sorted(line for line, _ in typed_values(planted)) == [2, 3]
    files = [*(PACKAGE / "rollouts" / "experiments").rglob("*.py"), *(PACKAGE / "atlas").rglob("*.py")]
    typed = [f"{path}:{line}: {code}" for path in files for line, code in typed_values(path.read_text())]
    assert typed == [], "\n".join(typed)
    # nor has the page: an axis, and the confidence of intervals
    for path in (PACKAGE / "atlas" / "page").glob("*.js"):
        assert set(re.findall(r"\d[\d.]* ?%", path.read_text())) <= {"100 %", "95 %"}, path


def test_no_measured_number_is_typed_into_an_experiment() -> None:
    planted = 'def f(x):\n    """At 3 %."""\n    raise ValueError("at least 2")\n    return f"{x:.1f} of 73.4 %, 95 %"'
    assert [(number, line) for line, number, _ in typed_numbers(planted)] == [("73.4", 4), ("95", 4)]
    files = sorted((PACKAGE / "rollouts" / "experiments").rglob("*.py"))
    assert len(files) > 30
    typed = [
        f"{path.name}:{line}: {number} in {text!r}"
        for path in files for line, number, text in typed_numbers(path.read_text()) if number not in SAID
    ]  # fmt: skip
    assert typed == [], "\n".join(typed)
