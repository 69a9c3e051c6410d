"""A small recorded run of the tabletop's scripted expert, for tests of what is made of one."""

from dataclasses import replace
from pathlib import Path

from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import run_rollouts

SUITE = replace(get_suite("goal"), expert=lambda task: lambda env: env.unwrapped.expert_action())


def record_run(folder: Path, episodes: int) -> Path:
    run_rollouts("expert", SUITE, episodes, seed=0, out=folder)
    return folder
