"""Simulators to act in. They need the `sim` extra; without a display, MuJoCo is told to render through EGL.

MuJoCo chooses how to draw when it is imported, so the choice is made here, before that.
"""

import importlib
import os
import sys
from contextlib import AbstractContextManager, suppress

from hooked_vla.extras import needs_packages

# seeds of starts that neither shipped policies nor their autoencoders were trained on begin here
UNSEEN = 700_000
_SIM_PACKAGES = ("gymnasium", "matplotlib", "mujoco", "pyarrow")

if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")

# Triton and Mesa's software OpenGL each bring an LLVM. Where a frame is drawn first, Triton binds to Mesa's, and the
# process ends when something imports it, as parts of torch do on their own
with suppress(ImportError):
    importlib.import_module("triton")


def needs_sim_extra() -> AbstractContextManager[None]:
    """`needs_packages` for the `sim` extra."""
    return needs_packages(_SIM_PACKAGES, "simulators and figures need: pip install hooked-vla[sim]")
