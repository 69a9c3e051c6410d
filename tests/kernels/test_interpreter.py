"""Every Triton kernel in Triton's interpreter, in a process of its own (interpreter/__main__.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

from hooked_vla.kernels import dispatch
from hooked_vla.kernels.aot import ops_with_kernels

HERE = Path(__file__).parent / "interpreter"


def test_every_op_with_kernels_has_checks() -> None:
    assert {f"check_{op}.py" for op in ops_with_kernels()} <= {file.name for file in HERE.glob("check_*.py")}


@pytest.mark.skipif(
    not dispatch.has_triton() and sys.platform != "linux", reason="Triton cannot be installed here: it is not Linux"
)
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, str(HERE), "-q", "-p", "no:cacheprovider", "-ra"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
