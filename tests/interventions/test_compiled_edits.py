"""Runs compiled_edits.py without runtime shape checks, which are not part of what users compile."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# tests in compiled_edits.py, of which one needs a GPU
EVERY = 11


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler, which it needs for what it fuses on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(not has_compiler(), reason="Inductor finds no C++ compiler")
def test_compiled_edits() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "--override-ini=addopts=", str(here / "compiled_edits.py")]
    done = subprocess.run(command, cwd=here.parent.parent, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    on_gpu = torch.cuda.is_available()
    assert f"{EVERY if on_gpu else EVERY - 1} passed" in done.stdout, done.stdout
