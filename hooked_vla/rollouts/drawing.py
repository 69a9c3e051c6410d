"""Draws the MuJoCo models of other people's environments, each with a renderer of its own.

gymnasium's and robosuite's renderers draw with whichever OpenGL context was made last, so that two environments in
one process show each other's scene. Here every frame is drawn in its own context, and their renderers are never made.
"""

# mujoco's classes and functions come from compiled modules that have no stubs
# pyright: reportAttributeAccessIssue=false

import atexit
import os
import weakref
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import mujoco

Quality = Literal["full", "fast"]
QUALITY_VARIABLE = "HOOKED_VLA_RENDER"

_OPEN: "weakref.WeakSet[ModelView]" = weakref.WeakSet()


def render_quality() -> Quality:
    """How adapters draw, from the environment variable HOOKED_VLA_RENDER.

    full (where it is not set): as the benchmark draws, so as its published policies were trained. fast: without
    multisampling, shadows and reflections, which without a GPU are most of the cost of a frame.
    Raises ValueError for another value.
    """
    value = os.environ.get(QUALITY_VARIABLE, "full")
    for quality in get_args(Quality):
        if value == quality:
            return quality
    raise ValueError(f"{QUALITY_VARIABLE}={value!r}: expected one of {get_args(Quality)}")


class ModelView:
    """A renderer of one MuJoCo model.

    hide_groups: groups of geoms that are not drawn; MuJoCo's own default otherwise.
    """

    def __init__(
        self,
        model: "mujoco.MjModel",
        data: "mujoco.MjData",
        height: int,
        width: int,
        hide_groups: tuple[int, ...] = (),
        show_groups: tuple[int, ...] = (),
    ) -> None:
        self.model, self.data, self.height, self.width = model, data, height, width
        self.quality = render_quality()
        self.option = mujoco.MjvOption()
        for group in hide_groups:
            self.option.geomgroup[group] = 0
        for group in show_groups:
            self.option.geomgroup[group] = 1
        self._renderer: mujoco.Renderer | None = None

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        """What a camera of the model sees now, upright."""
        if self._renderer is None:
            self._renderer = self._make()
        self._renderer.update_scene(self.data, camera, self.option)
        return self._renderer.render().copy()

    def close(self) -> None:
        """Free the renderer; it is made again when something is drawn."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _make(self) -> "mujoco.Renderer":
        visual = self.model.vis
        visual.global_.offwidth = max(visual.global_.offwidth, self.width)
        visual.global_.offheight = max(visual.global_.offheight, self.height)
        samples = visual.quality.offsamples
        if self.quality == "fast":
            visual.quality.offsamples = 0
        try:
            renderer = mujoco.Renderer(self.model, self.height, self.width)
        finally:
            visual.quality.offsamples = samples
        if self.quality == "fast":
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        _OPEN.add(self)
        # last registered runs first: before MuJoCo's own exit takes EGL away from renderers that nobody closed
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        return renderer


def _close_all() -> None:
    for view in list(_OPEN):
        view.close()
