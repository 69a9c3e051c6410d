"""Folders that appear when complete: what fails, what was killed, and two at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hooked_vla.folders import new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from hooked_vla.folders import new_folder
with new_folder(Path(sys.argv[1])) as making:
    (making / "a").mkdir()
    (making / "a/half").write_text("left")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _fill(folder: Path, text: str) -> None:
    with new_folder(folder) as making:
        assert not list(making.iterdir())
        (making / "text").write_text(text)


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_new_takes_the_place_of_the_earlier(tmp_path):
    _fill(tmp_path / "a/out", "first")
    _fill(tmp_path / "a/out", "second")
    assert _contents(tmp_path) == {"a/out/text": "second"}


def test_a_failure_leaves_what_was_there(tmp_path):
    _fill(tmp_path / "out", "first")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as making:
        (making / "half").mkdir()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and _contents(tmp_path) == {"out/text": "first"}


def test_what_a_killed_process_left_is_cleared(tmp_path):
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists() and list(_contents(tmp_path).values()) == ["left"]
    _fill(out, "whole")
    assert _contents(tmp_path) == {"out/text": "whole"}


def test_what_must_not_be_replaced_is_not_also_if_it_came_meanwhile(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="out is there already"), new_folder(out, replace=False) as making:
        (making / "text").write_text("mine")
        out.mkdir()
        (out / "text").write_text("theirs")
    assert _contents(tmp_path) == {"out/text": "theirs"} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError), new_folder(out, replace=False):
        raise AssertionError("it is there")


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as making:
        with pytest.raises(BlockingIOError, match="is writing .*out"), new_folder(out):
            raise AssertionError("two write one folder")
        (making / "text").write_text("whole")
    assert _contents(tmp_path) == {"out/text": "whole"}
