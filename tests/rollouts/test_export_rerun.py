"""Rerun's recordings: what was logged is read back with Rerun's own reader."""

import errno
import importlib.util
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import record_run
from PIL import Image

from hooked_vla.rollouts.export import export_run
from hooked_vla.rollouts.replay import Episode, replay

needs_rerun = pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None,
    reason="rerun-sdk is not installed: pip install 'hooked-vla[export]'",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield record_run(tmp_path_factory.mktemp("rerun") / "run", episodes=2)


@pytest.fixture
def episode(run: Path) -> Episode:
    return next(replay(run, episodes=[1], cameras=["agent"], image_size=32))


def read(path: Path) -> dict[str, dict[int, Any]]:
    """Entity -> environment step -> what was logged (step -1 for what holds throughout)."""
    chunk = pytest.importorskip("rerun.chunk", reason="this version of rerun-sdk has no reader of its files")
    found: dict[str, dict[int, Any]] = {}
    for part in chunk.RrdReader(path).stream():
        table = part.to_record_batch()
        names = [name for name in table.schema.names if ":" in name and not name.endswith("media_type")]
        steps = table["env_step"].to_pylist() if "env_step" in table.schema.names else [-1] * table.num_rows
        for step, value in zip(steps, table[names[0]].to_pylist(), strict=True):
            found.setdefault(part.entity_path, {})[step] = value[0] if len(value) == 1 else value
    return found


@needs_rerun
def test_an_episode_can_be_read_back(episode, tmp_path):
    from hooked_vla.rollouts.export_rerun import write_rerun

    shown = read(write_rerun(tmp_path / "deep" / "a.rrd", episode))
    n = len(episode)
    for i in range(4):
        assert shown[f"/state/{i}"] == {
            s: float(v) for s, v in enumerate([*episode.states[:, i], episode.last_state[i]])
        }
        assert shown[f"/action/{i}"] == {step: float(value) for step, value in enumerate(episode.actions[:, i])}
    assert shown["/reward"] == dict(enumerate(episode.rewards)) and shown["/success"][n - 1] == 1.0
    assert shown["/phase"] == dict(enumerate(episode.columns["phase"]))
    assert "put the" in shown["/about"][-1] and "- seed: 1" in shown["/about"][-1]
    assert sorted(shown["/camera/agent"]) == list(range(n + 1))
    for step, expected in ((0, episode.images["agent"][0]), (n, episode.last_images["agent"])):
        image = np.array(Image.open(io.BytesIO(bytes(shown["/camera/agent"][step]))))
        assert np.abs(image.astype(int) - expected).mean() < 10
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.rrd"]


@needs_rerun
def test_every_episode_of_a_run_gets_a_file(run, tmp_path):
    files = export_run(run, "rerun", tmp_path / "out", cameras=["wrist"], image_size=32, jpeg_quality=50)
    assert [file.name for file in files] == ["episode-000000000.rrd", "episode-000000001.rrd"]
    assert all("/camera/wrist" in read(file) for file in files)


@needs_rerun
def test_what_cannot_be_logged_leaves_nothing(episode, tmp_path):
    from hooked_vla.rollouts.export_rerun import write_rerun

    with pytest.raises(TypeError):
        write_rerun(tmp_path / "a.rrd", replace(episode, columns={"x": [object()] * len(episode)}))
    with pytest.raises(ValueError, match="jpeg_quality is 1..100, got 0"):
        write_rerun(tmp_path / "a.rrd", episode, jpeg_quality=0)
    assert not [*tmp_path.iterdir()]


@needs_rerun
def test_a_full_disk_leaves_nothing(episode, tmp_path, monkeypatch):
    from hooked_vla.rollouts.export_rerun import write_rerun

    def fill(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.rrd"):
        write_rerun(tmp_path / "a.rrd", episode)
    assert not [*tmp_path.iterdir()]


def test_a_missing_package_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.delitem(sys.modules, "hooked_vla.rollouts.export_rerun", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"rerun.* is not installed.*hooked-vla\[export\]"):
        export_run(run, "rerun", tmp_path / "out")
    assert not [*tmp_path.iterdir()]
