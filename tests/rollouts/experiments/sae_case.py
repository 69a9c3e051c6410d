"""A tiny run of an experiment on autoencoders: few episodes that are cut short, and hardly any training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import injection_case

from hooked_vla.rollouts.experiments.context import Context

TINY = {"shipped": False, "train_episodes": 2, "train_steps": 4, "train_batch": 32}


def context(experiment: str, out: Path, **settings: Any) -> Context:
    """A run with other settings than its file's; what autoencoders are trained on is cut short too."""
    made = injection_case.context(experiment, out, **{**TINY, **settings})
    return replace(made, options=replace(made.options, max_steps=8))


def run(experiment: str, out: Path, **settings: Any) -> tuple[Context, Any]:
    """`run_context` of `context`."""
    return injection_case.run_context(context(experiment, out, **settings))
