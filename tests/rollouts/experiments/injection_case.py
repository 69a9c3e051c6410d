"""A tiny run of an experiment on injection: two episodes that are cut short, on a shipped policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.report import write_outcome
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options

MODEL = "smolvla-tabletop"
# two arms of two episodes in one batch
OPTIONS = Options(n_envs=4, image_size=96)


def context(experiment: str, out: Path, model: str = MODEL, **settings: Any) -> Context:
    """A run with other settings than its file's."""
    definition = find_experiment(experiment)
    small = {"episodes": 2, "max_steps": 8, **settings}
    definition = replace(definition, settings={**definition.settings, **small}, quick={})
    return Context(definition, ModelSource(model), out, options=OPTIONS)


def run(experiment: str, out: Path, **settings: Any) -> tuple[Context, Any]:
    """`run_context` of `context`."""
    return run_context(context(experiment, out, **settings))


def run_context(made: Context) -> tuple[Context, Any]:
    """The run's context and outcome, written as users get it."""
    made.claim()
    outcome = made.definition.module.run(made, made.definition.settle(False))
    write_outcome(made, outcome)
    return made, outcome
