"""A small MuJoCo tabletop: blocks, pads, and a suction cup on a gantry that picks and places by real contact.

Importing this registers the Gymnasium id `hooked_vla/Tabletop-v0`; `suite` and `task` are its arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import gymnasium

    from hooked_vla.rollouts.suites import Suite, SuiteTask
    from hooked_vla.rollouts.tabletop.env import FPS, TabletopEnv
    from hooked_vla.rollouts.tabletop.expert import PHASES
    from hooked_vla.rollouts.tabletop.scene import BLOCKS, CAMERAS, PADS
    from hooked_vla.rollouts.tabletop.tasks import TASKS, find_task

ENV_ID = "hooked_vla/Tabletop-v0"
# the scripted expert takes about 35 steps, 70 where it is told to be slow
MAX_STEPS = 120

gymnasium.register(ENV_ID, "hooked_vla.rollouts.tabletop.env:TabletopEnv", max_episode_steps=MAX_STEPS)


def _suite(name: str) -> Suite:
    def make(task: str, cameras: Sequence[str], image_size: int) -> TabletopEnv:
        return TabletopEnv(name, task, image_size, cameras)

    def expert(task: str) -> Callable[[Any], Any]:
        find_task(name, task)
        return lambda env: env.unwrapped.expert_action()

    tasks = tuple(SuiteTask(task.id, task.instruction) for task in TASKS[name])
    return Suite(
        name, tasks, CAMERAS, d_state=4, d_action=4, max_steps=MAX_STEPS, fps=FPS, make=make, expert=expert,
        phases=PHASES,
    )  # fmt: skip


SUITES = {name: _suite(name) for name in TASKS}

__all__ = ["BLOCKS", "CAMERAS", "ENV_ID", "MAX_STEPS", "PADS", "SUITES", "TASKS", "TabletopEnv"]
