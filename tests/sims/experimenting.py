"""Experiments on a simulator's suites, from the first look to the report; of random weights no claim is made."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
from recorded import tiny_policy

from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.suites import Suite


def check_experiments(suite: Suite, other: Suite, folder: Path) -> None:
    """E1 on two suites and E4 on one: every rule is answered, and none is judged where the policy cannot act."""
    model = str(tiny_policy(folder / "policy", suite, suite.d_action))
    short = {"episodes": 2, "max_steps": 6}
    prompts = find_experiment("E1")
    settings = {**short, "unique_suite": other.name, "shared_suite": suite.name, "kinds": ["null", "other_task"]}
    check_report(replace(prompts, settings=settings, quick={}), folder / "E1", model)
    tasks = find_experiment("E4")
    injected = ["vlm:middle", "expert"]
    few = {"injected": injected, "controls": injected[:1], "cross_prompt": injected[1:], "cross_seed": False}
    settings = {**tasks.settings, **short, **few, "suite": suite.name}
    table = check_report(replace(tasks, settings=settings, quick={}), folder / "E4", model)
    assert set(injected) < set(table.arm)


def check_report(definition, out: Path, model: str) -> pd.DataFrame:
    outcome = run_experiment(definition, out, model)
    assert {each.rule for each in outcome.verdicts} == {rule.id for rule in definition.rules}
    assert all(each.holds is None for each in outcome.verdicts), "a policy of random weights proves nothing"
    assert {"report.md", "results.parquet", "figures"} < {path.name for path in out.iterdir()}
    assert "not judged" in (out / "report.md").read_text()
    return pd.read_parquet(out / "results.parquet")
