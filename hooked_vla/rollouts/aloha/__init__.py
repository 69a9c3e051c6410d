"""ALOHA in simulation (Zhao et al. 2023; gym-aloha 0.1.5): two arms pass a cube on, or put a peg in a socket."""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

from hooked_vla.extras import needs_packages

with needs_packages(("dm_control", "gym_aloha", "gymnasium", "mujoco"), "ALOHA needs: pip install hooked-vla[aloha]"):
    from hooked_vla.rollouts.adapter import Expert
    from hooked_vla.rollouts.aloha.env import CAMERAS, FPS, N_JOINTS, AlohaEnv
    from hooked_vla.rollouts.aloha.expert import scripted_expert
    from hooked_vla.rollouts.drawing import render_quality
    from hooked_vla.rollouts.suites import Suite, SuiteTask

# gym_aloha/__init__.py: max_episode_steps
MAX_STEPS = 300
# as in the data sets lerobot/aloha_sim_transfer_cube_human and lerobot/aloha_sim_insertion_human
INSTRUCTIONS = {
    "transfer_cube": "Pick up the cube with the right arm and transfer it to the left arm.",
    "insertion": "Insert the peg into the socket.",
}


def _suite(only: str) -> Suite:
    name = f"aloha_{only}"

    def make(task: str, cameras: Sequence[str], image_size: int) -> AlohaEnv:
        return AlohaEnv(SUITES[name].task(task), cameras, image_size)

    def expert(task: str) -> Expert:
        return scripted_expert(SUITES[name].task(task).id)

    return Suite(
        name,
        (SuiteTask(only, INSTRUCTIONS[only]),),
        tuple(CAMERAS),
        d_state=N_JOINTS,
        d_action=N_JOINTS,
        max_steps=MAX_STEPS,
        fps=FPS,
        make=make,
        expert=expert,
        packages=("gym-aloha", "dm_control"),
        quality=render_quality,
    )


SUITES = {f"aloha_{task}": _suite(task) for task in INSTRUCTIONS}

__all__ = ["CAMERAS", "MAX_STEPS", "SUITES", "AlohaEnv"]
