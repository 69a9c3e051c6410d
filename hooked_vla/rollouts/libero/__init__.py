"""LIBERO (Liu et al. 2023; package hf-libero 0.1.4): 40 tasks of a Panda arm in four suites of ten.

Importing this never asks on the terminal, which the package does where it finds no config of its own.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

from collections.abc import Sequence

from hooked_vla.extras import needs_packages
from hooked_vla.rollouts.libero_files import ensure_config

INSTALL = (
    "LIBERO needs: pip install hooked-vla[libero], then "
    "pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
)
_PACKAGES = ("bddl", "cloudpickle", "cv2", "easydict", "future", "gymnasium", "h5py", "imageio", "jupytext", "libero",
             "matplotlib", "mujoco", "numba", "robosuite", "scipy", "termcolor", "yaml")  # fmt: skip

with needs_packages(_PACKAGES, INSTALL):
    ensure_config()

    from libero.libero.benchmark import task_maps

    from hooked_vla.rollouts.adapter import Expert
    from hooked_vla.rollouts.drawing import render_quality
    from hooked_vla.rollouts.libero.env import CAMERAS, FPS, N_STARTS, LiberoEnv
    from hooked_vla.rollouts.libero.expert import scripted_expert
    from hooked_vla.rollouts.suites import Suite, SuiteTask

# openvla experiments/robot/libero/run_libero_eval.py: a little longer than the longest demonstration
MAX_STEPS = {"libero_goal": 300, "libero_object": 280, "libero_spatial": 220, "libero_10": 520}


def _suite(name: str) -> Suite:
    def make(task: str, cameras: Sequence[str], image_size: int) -> LiberoEnv:
        return LiberoEnv(name, SUITES[name].task(task), cameras, image_size)

    def expert(task: str) -> Expert:
        return scripted_expert(name, SUITES[name].task(task).id)

    return Suite(
        name,
        tuple(SuiteTask(task.name, task.language) for task in task_maps[name].values()),
        tuple(CAMERAS),
        d_state=8,
        d_action=7,
        max_steps=MAX_STEPS[name],
        fps=FPS,
        make=make,
        n_starts=N_STARTS,
        expert=expert,
        packages=("hf-libero", "robosuite", "bddl"),
        quality=render_quality,
    )


SUITES = {name: _suite(name) for name in MAX_STEPS}

__all__ = ["CAMERAS", "MAX_STEPS", "SUITES", "LiberoEnv"]
