"""A folder that takes long to make, made once for all worker processes of a test session."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# how long another worker may take to make it
PATIENCE_S = 300.0


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` filled, whichever process of this session did. It is nobody's own: leave it as it is.

    Raises RuntimeError where the process that made it failed, or takes longer than PATIENCE_S.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # each worker has a folder of its own in the session's
        base = base.parent
    folder, making, failed = (base / f"{prefix}{name}" for prefix in ("shared-", "making-", "failed-"))
    try:
        making.mkdir()
    except FileExistsError:
        ends = time.monotonic() + PATIENCE_S
        while not folder.is_dir():
            if failed.exists() or time.monotonic() > ends:
                raise RuntimeError(f"the process that makes {folder} failed, or is too slow") from None
            time.sleep(0.1)
        return folder
    try:
        inside = making / "whole"
        inside.mkdir()
        make(inside)
        inside.rename(folder)
    except BaseException:
        failed.touch()
        raise
    return folder
