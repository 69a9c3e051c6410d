"""Results on disk: whole episodes or nothing, written once, the same bytes every time."""

import errno
import logging
from pathlib import Path

import pytest

from hooked_vla import folders
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.records import EPISODES, MANIFEST, STEPS, EpisodeLog, Part, Store, read_episodes, read_steps


def make_part(number: int, n_steps: int = 3, state: float = 0.5) -> Part:
    log = EpisodeLog(Cell(number, "baseline", "walk", number), "go")
    for step in range(n_steps):
        log.step({"state": [state, step]}, {"phase": "far"}, [0.1, 0.2], (step // 2, step % 2), 0.5, False)
    return log.finish("model", "toy", "time limit", {"state": [state, n_steps]}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST).write_text("{}")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_recorded_reads_back_in_order_and_as_the_same_bytes(folder: Path) -> None:
    assert make_part(7) == make_part(7) != make_part(7, state=0.6)
    with Store.open(folder) as store:
        assert all(store.add(make_part(number)) for number in (1002, 0, 7))
    episodes, steps = read_episodes(folder), read_steps(folder)
    assert episodes.schema == EPISODES and steps.schema == STEPS
    assert (
        episodes["episode"].to_pylist() == [0, 7, 1002]
        and steps["episode"].to_pylist() == [0] * 3 + [7] * 3 + [1002] * 3
    )
    assert episodes["n_chunks"].to_pylist() == [2] * 3 and episodes["total_reward"].to_pylist() == [1.5] * 3
    assert episodes["final_phase"].to_pylist() == [None] * 3 == episodes["final_poses"].to_pylist()
    assert read_steps(folder, [7]) == steps.slice(3, 3)
    assert "episodes/001/000001002.parquet" in files(folder)
    with pytest.raises(KeyError, match=r"episodes \[8\] are not recorded"):
        read_steps(folder, [8])


def test_a_new_folder_reads_as_empty_tables(folder: Path) -> None:
    assert read_episodes(folder).num_rows == read_steps(folder).num_rows == 0
    assert read_steps(folder).schema == STEPS


def test_nothing_is_written_twice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store.open(folder) as store:
        store.add(make_part(0))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    with Store.open(folder) as store, caplog.at_level(logging.WARNING):
        assert store.recorded == {0}
        assert not store.add(make_part(0)) and not caplog.records
        assert not store.add(make_part(0, state=0.6)) and "came out otherwise" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_full_disk_leaves_whole_episodes(folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """fails_at: the steps' file, or the episode's."""
    with Store.open(folder) as store:
        store.add(make_part(0))
        before, write, calls = files(folder), Path.write_bytes, []

        def write_half(path: Path, content: bytes) -> int:
            calls.append(path)
            if len(calls) <= fails_at:
                return write(path, content)
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(
            OSError, match=r"no space left for episode 5 .*1 episodes are recorded.*same command"
        ) as raised:
            store.add(make_part(5))
        assert raised.value.errno == errno.ENOSPC and store.recorded == {0}
        monkeypatch.undo()
    steps = {"steps/000/000000005.parquet": make_part(5).steps} if fails_at else {}
    assert files(folder) == before | steps
    # the steps of an episode that is not recorded do not count
    assert read_steps(folder)["episode"].unique().to_pylist() == read_episodes(folder)["episode"].to_pylist() == [0]
    with Store.open(folder) as store:
        assert store.add(make_part(5))
    assert read_steps(folder).num_rows == 6


def test_what_a_killed_process_left_is_removed_or_written_again(folder: Path) -> None:
    with Store.open(folder) as store:
        store.add(make_part(0))
        store.add(make_part(1))
    whole = files(folder)
    (folder / "steps/000/.000000002.parquet.tmp").write_bytes(b"half")
    # a name without content, as a machine that lost power may leave it
    (folder / "episodes/000/000000001.parquet").write_bytes(b"")
    assert read_episodes(folder)["episode"].to_pylist() == [0]
    with Store.open(folder) as store:
        assert store.recorded == {0} and store.add(make_part(1))
    assert files(folder) == whole


def test_one_process_records_at_a_time(folder: Path) -> None:
    with Store.open(folder), pytest.raises(BlockingIOError, match="another process is recording"), Store.open(folder):
        pass
    with Store.open(folder):
        pass


@pytest.mark.parametrize(("content", "message"), [("{", "damaged"), ("[]", "holds a list"), ("\x80", "damaged")])
def test_a_damaged_manifest_is_named(folder: Path, content: str, message: str) -> None:
    (folder / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{MANIFEST}.*{message}"):
        read_episodes(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder of rollouts"):
        read_steps(tmp_path)


def test_other_errors_of_the_disk_pass_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with Store.open(folder) as store:
        monkeypatch.setattr(folders.os, "replace", refuse)
        with pytest.raises(PermissionError):
            store.add(make_part(0))
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.parquet"))
