"""`hooked-vla export`, and what it says of mistakes."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from exporting import record_run
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.rollouts.export_cli import read_numbers
from hooked_vla.rollouts.video import Film, read_film

RUNNER = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield record_run(tmp_path_factory.mktemp("cli") / "run", episodes=3)


def test_films_of_some_episodes(run, tmp_path):
    out = tmp_path / "films"
    arguments = ["export", str(run), "--to", "mp4", "--out", str(out), "--episodes", "0,2", "--cameras", "agent"]
    result = RUNNER.invoke(app, [*arguments, "--image-size", "32"])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in out.iterdir()) == ["episode-000000000.mp4", "episode-000000002.mp4"]
    assert read_film(out / "episode-000000002.mp4").shape[1:] == (32, 32, 3)
    assert "episode 2: " in result.output and "and 1 more" in result.output


def test_mistakes_are_said_without_a_traceback(run, tmp_path):
    for folder, options, message in (
        (run, ["--to", "zarr"], "unknown format 'zarr'; formats: ['lerobot', 'rerun', 'mp4']"),
        (run, ["--to", "mp4", "--episodes", "0-x"], 'episodes are numbers, as in "0,3,10-19"'),
        (run, ["--to", "mp4", "--episodes", "7"], "episodes [7] are not recorded"),
        (run, ["--to", "mp4", "--cameras", "front"], "has no cameras ['front']"),
        (tmp_path, ["--to", "mp4"], "not a folder of rollouts"),
    ):
        result = RUNNER.invoke(app, ["export", str(folder), "--out", str(tmp_path / "out"), *options])
        assert result.exit_code == 2
        assert message in re.sub(r"[\s│]+", " ", result.output)
    (tmp_path / "there").mkdir()
    result = RUNNER.invoke(app, ["export", str(run), "--to", "lerobot", "--out", str(tmp_path / "there")])
    assert result.exit_code == 2 and "is there already" in result.output


def test_a_full_disk_is_one_message(run, tmp_path, monkeypatch):
    close, out = Film.close, tmp_path / "out"

    def fill(film: Film) -> None:
        if "000000001" in film.path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(film.path))
        close(film)

    monkeypatch.setattr(Film, "close", fill)
    arguments = ["export", str(run), "--to", "mp4", "--out", str(out), "--cameras", "agent", "--image-size", "32"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"No space left on device: {out / 'episode-000000001.mp4'}" in " ".join(result.output.split())
    assert [file.name for file in out.iterdir()] == ["episode-000000000.mp4"]


def test_numbers():
    assert read_numbers("0, 3,10-12") == [0, 3, 10, 11, 12]
    for wrong in ("", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ValueError, match="episodes are numbers"):
            read_numbers(wrong)
