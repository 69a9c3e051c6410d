"""Simulators to act in. They need the `sim` extra; without a display, MuJoCo is told to render through EGL.

MuJoCo chooses how to draw when it is imported, so the choice is made here, before that.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SIM_PACKAGES = ("gymnasium", "matplotlib", "mujoco")

if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")


@contextmanager
def needs_sim_extra() -> Iterator[None]:
    """Around imports of the `sim` extra: a missing package becomes an error that says how to install it.

    Raises ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _SIM_PACKAGES:
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; simulators and figures need: pip install hooked-vla[sim]", name=error.name
        ) from error
