"""What a replay gives is kept and found again, is tried again unless it was refused, and is shared out."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hooked_vla.atlas import attending, pictures, replays
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import attention, films, replayed
from hooked_vla.atlas.worker import Refused, Worker, WorkError
from hooked_vla.rollouts.replay import Episode

TASKS = {"film": replays.film, "pictures": pictures.pictures}


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Iterator[Run]:
    """Three folders of rollouts."""
    for name in ("a", "b", "c"):
        shutil.copytree(run_folder / "E4" / "rollouts" / "rerun", tmp_path / "RUN" / name)
    found = Run.open(tmp_path / "RUN", cache=tmp_path / "cache")
    yield found
    found.close()


def test_a_share_is_fair_and_comes_group_by_group() -> None:
    groups = ["aaaa", "", "b", "cccc"]
    assert "".join(replayed.fair(groups, 2)) == "ab"
    assert "".join(replayed.fair(groups, 6)) == "aaabcc"
    assert "".join(replayed.fair(groups, 100)) == "aaaabcccc"


def test_an_export_holds_something_of_every_folder(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "EXPORTED_IN_ALL", 4)
    shown = [(each["rollout"], each["episode"]) for each in films.exported_films(copied)]
    assert shown == [("a", "0"), ("a", "1"), ("b", "0"), ("c", "0")]
    monkeypatch.setattr(attention, "EXPORTED_IN_ALL", 5)
    plans = [(each["rollout"], each["episode"], each["step"]) for each in attention.exported_choices(copied)]
    assert plans == [("a", "0", "0"), ("a", "1", "0"), ("b", "0", "0"), ("b", "1", "0"), ("c", "0", "0")]


def test_maps_of_every_plan_begin_with_what_the_page_begins_with(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def choices(run: Run, rollout: str, **_: str) -> dict[str, Any]:
        # as of a folder whose model is not here
        if rollout == "b":
            return {"error": "not on this machine"}
        sites = [("first", True, True), ("shown", True, True), ("blind", False, True), ("dead", True, False)]
        return {"sites": [{"site": name, "sees": sees, "reaches_action": reaches, "queries": ["all", "image:top"]}
                          for name, sees, reaches in sites]}  # fmt: skip

    monkeypatch.setattr(attention, "get_choices", choices)
    monkeypatch.setattr(attention, "EXPORTED_IN_ALL", 3)
    monkeypatch.setattr(attention, "EXPORTED_MAPS", 8)
    found = [(each["rollout"], each["site"], each["queries"]) for each in attention.exported_attention(copied)]
    own = [("shown", "image~top"), ("shown", "all"), ("first", "image~top"), ("first", "all")]
    assert found == [(key, *pair) for key in ("a", "c") for pair in own]


def film_of(run: Run) -> str | None:
    return films.get_film(run, "a", "0")["error"]


def test_what_may_pass_is_tried_again(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [WorkError("no space left"), Refused("other states"), AssertionError("asked again")]

    def fails(*_: object) -> object:
        raise faults.pop(0)

    monkeypatch.setattr(Worker, "run", fails)
    assert [film_of(copied) for _ in range(4)] == ["no space left", "other states", "other states", "other states"]


def test_a_refusal_of_the_process_is_remembered(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as such on its way from there."""
    steps = copied.rollouts["a"].path / "steps" / "000" / "000000000.parquet"
    rows = pq.ParquetFile(steps).read().to_pylist()
    rows[1]["state"][0] += 0.01
    pq.write_table(pq.ParquetFile(steps).read().from_pylist(rows, pq.read_schema(steps)), steps)
    asked: list[str] = []
    real = Worker.run

    def noted(self: Worker, task: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        asked.append(task)
        return real(self, task, arguments, seconds)

    monkeypatch.setattr(Worker, "run", noted)
    said = film_of(copied)
    assert said is not None and "step 1: the state differs" in said and film_of(copied) == said
    assert asked == ["film"]
    with pytest.raises(WorkError, match="no such task") as other:
        replayed.replays(copied).run("no such task", {}, 60.0)
    assert not other.value.final


@pytest.mark.parametrize(
    ("error", "final"),
    [(ValueError("no such camera"), True), (KeyError("no episode 7"), True), (ModuleNotFoundError("no mujoco"), True),
     (replays.ReplayError("step 1"), True), (OSError(28, "No space left"), False), (MemoryError(), False)],
)  # fmt: skip
def test_only_what_lasts_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, final: bool
) -> None:
    def fails(*_: object) -> object:
        raise error

    monkeypatch.setattr(replays, "replay", fails)
    with pytest.raises(WorkError) as told:
        replays.again(run_folder / "E4" / "rollouts" / "rerun", 0, None)
    assert told.value.final is final and (str(error) or "MemoryError").strip("'") in str(told.value)


class Replayed(SimpleNamespace):
    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("task", list(TASKS))
def test_nothing_is_left_of_what_failed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    # frames that neither films nor pictures can be made of, after one that they can
    good, bad = np.zeros((4, 16, 16, 3), np.uint8), np.zeros((4, 5, 7, 9), np.float32)
    last = {"top": good[0], "wrist": bad[0]}
    found = Replayed(images={"top": good, "wrist": bad}, fps=20, last_images=last)
    for module in (replays, pictures):
        monkeypatch.setattr(module, "again", lambda *_: found)
    asked = {"folder": "f", "episode": 0, "image_size": 16, "steps": [0, 1], "out": str(tmp_path / "films" / "x")}
    with pytest.raises((TypeError, ValueError)):
        TASKS[task](asked, print, lambda: False)
    assert list((tmp_path / "films").iterdir()) == []


def test_an_episode_is_replayed_again_for_another_manifest(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_folder / "E4" / "rollouts" / "rerun", tmp_path / "run")
    again: list[int] = []

    def replayed_again(folder: Path, number: int, image_size: int | None) -> Episode:
        again.append(number)
        steps = np.zeros((1, 2), np.float32)
        return Episode(number, "go", 20, {}, steps, steps, np.zeros(1), np.zeros(1, bool), {}, steps[0])

    monkeypatch.setattr(attending, "_REPLAYS", type(attending._REPLAYS)())
    monkeypatch.setattr(attending, "again", replayed_again)
    first = attending._replayed(tmp_path / "run", 0)
    assert attending._replayed(tmp_path / "run", 0) is first
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert attending._replayed(tmp_path / "run", 0) is not first and again == [0, 0]
