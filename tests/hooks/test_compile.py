"""Runs compiled.py without runtime shape checks, which are not part of what users compile."""

import subprocess
import sys
from pathlib import Path


def test_compiled_model_equals_eager() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "--override-ini=addopts=", str(here / "compiled.py")]
    done = subprocess.run(command, cwd=here.parent.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout, done.stdout
