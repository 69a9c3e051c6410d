"""Runs the checks of Triton kernels in Triton's interpreter: python tests/kernels/interpreter [FILE.py] [OPTIONS].

Without a file, all of check_*.py; the options are pytest's. A process of its own: the variable must be set before
Triton is imported, and the shape checks that pytest switches on elsewhere would wrap the kernels' source.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    import pytest

    # bounds.py and the like, beside the tests of the other paths
    sys.path.append(str(HERE.parent))
    given = [str(HERE / each) if (HERE / each).is_file() else each for each in arguments]
    files = [] if any(each.split("::")[0].endswith(".py") for each in given) else [str(HERE)]
    settings = ["addopts=", "python_files=check_*.py", "testpaths="]
    options = ["-p", "shim", "--confcutdir", str(HERE), *(f"--override-ini={each}" for each in settings)]
    return int(pytest.main([*options, *files, *given]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
