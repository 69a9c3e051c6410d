"""Lists, rates and tracks say what the tables say; whatever is wrong with a folder is told and harms nothing else."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import episode_index, episodes, films
from hooked_vla.atlas.views.arm_text import arm_text, shortened, told_text
from hooked_vla.atlas.views.attention import get_attention, get_choices
from hooked_vla.atlas.views.episode_index import EpisodeIndex
from hooked_vla.atlas.views.replayed import replays
from hooked_vla.atlas.worker import Worker
from hooked_vla.interventions import Ablate
from hooked_vla.interventions.arm import EditArm
from hooked_vla.rollouts.batteries.arms import ImageArm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.summary import summarise
from hooked_vla.rollouts.video import read_film

KEY = "E4--rollouts--main"


@pytest.fixture(scope="module")
def main_folder(run: Run) -> Path:
    return run.rollouts[KEY].path


@pytest.fixture
def copied(run: Run, main_folder: Path, tmp_path: Path) -> Iterator[Run]:
    """The main rollouts alone, in a folder that may be changed; its replays run in `run`'s worker."""
    shutil.copytree(main_folder, tmp_path / "run")
    found = Run.open(tmp_path / "run", cache=tmp_path / "cache")
    # to begin a process takes longer than all that it does here
    worker = replays(run)
    found.keep("replays", lambda: Borrowed(worker))
    yield found
    found.close()


class Borrowed(Worker):
    """Another run's worker, which stays open."""

    def __init__(self, worker: Worker) -> None:
        self.__dict__ = worker.__dict__

    def close(self) -> None:
        pass


def episode_file(run: Run, number: int, kind: str = "episodes") -> Path:
    return run.rollouts["run"].path / kind / "000" / f"{number:09d}.parquet"


def test_every_folder_is_listed_with_what_was_planned(run: Run) -> None:
    listed = {row["key"]: row for row in episodes.list_rollouts(run)}
    assert set(listed) == set(run.rollouts)
    manifest = run.rollouts[KEY].manifest
    assert listed[KEY]["planned"] == len(manifest["arms"]) * len(manifest["scenes"])
    edited = episodes.get_episode(run, KEY, str(listed[KEY]["edited"]))
    assert edited["arm_kind"] != "baseline"
    assert (edited["task"], edited["seed"]) == tuple(manifest["scenes"][0])


def test_rates_are_those_of_the_table(run: Run, main_folder: Path) -> None:
    EpisodeIndex.of(run, KEY).wait()
    found = {(rate["arm"], rate["task"]): rate for rate in episodes.get_rollout(run, KEY)["rates"]}
    known = summarise(read_episodes(main_folder))
    assert len(found) == sum(1 + len(each.by_task) for each in known.values())
    for arm, each in known.items():
        for task, rate in {None: each.overall, **each.by_task}.items():
            row = found[arm, task]
            assert (row["successes"], row["episodes"]) == (rate.successes, rate.episodes)
            assert (row["low"], row["high"]) == rate.interval


def test_rows_are_the_same_before_and_after_the_index_is_made(copied: Run, main_folder: Path) -> None:
    index = EpisodeIndex.of(copied, "run")
    straight = index.rows(index.numbers()[: episodes.PAGE])
    index.wait()
    page = episodes.get_page(copied, "run", "1")
    assert page["indexed"]
    assert page["rows"] == straight
    table = read_episodes(main_folder).select(list(episode_index.COLUMNS)).to_pylist()
    assert [{name: row[name] for name in episode_index.COLUMNS} for row in page["rows"]] == table
    with pytest.raises(NotThere, match="no page 2"):
        episodes.get_page(copied, "run", "2")


def test_filters_take_the_table_apart(run: Run, main_folder: Path) -> None:
    EpisodeIndex.of(run, KEY).wait()
    table = read_episodes(main_folder).to_pylist()

    def chosen(**keys: str) -> list[int]:
        return [row["episode"] for row in episodes.find_episodes(run, KEY, **keys)["rows"]]

    for arm in run.rollouts[KEY].manifest["arms"]:
        assert chosen(arm=arm) == [row["episode"] for row in table if row["arm"] == arm]
    task = table[0]["task"]
    failed = [row["episode"] for row in table if row["task"] == task and not row["success"]]
    assert chosen(task=task, outcome="failure") == failed
    assert sorted(chosen(outcome="success") + chosen(outcome="failure")) == chosen()
    # text of a page is a value, never a part of the question
    assert chosen(arm="' OR 1=1 --") == []
    with pytest.raises(ValueError, match="outcomes"):
        episodes.find_episodes(run, KEY, outcome="1; DROP TABLE x")


def test_tracks_are_the_recorded_steps_and_the_end(run: Run, main_folder: Path) -> None:
    number = len(run.rollouts[KEY].manifest["scenes"]) + 1
    found = episodes.get_episode(run, KEY, str(number))
    steps, tracks = read_steps(main_folder, [number]).to_pylist(), found["steps"]
    last = read_episodes(main_folder, [number]).to_pylist()[0]
    assert tracks["n"] == len(steps) == found["n_steps"]
    np.testing.assert_allclose(
        tracks["state"], [*(s["state"] for s in steps), last["final_state"]], rtol=0, atol=5.1e-5
    )
    np.testing.assert_allclose(tracks["action"], [s["action"] for s in steps], rtol=0, atol=5.1e-5)
    assert tracks["hand"]["z"] == [state[2] for state in tracks["state"]]
    assert tracks["phase"] == [*(s["phase"] for s in steps), last["final_phase"]]
    block = next(each for each in tracks["objects"] if each["name"] == "red")
    poses = [dict(s["poses"])["blocks/red"] for s in steps] + [dict(last["final_poses"])["blocks/red"]]
    assert block["group"] == "blocks"
    np.testing.assert_allclose(block["x"], [p[0] for p in poses][: len(block["x"])], rtol=0, atol=5.1e-5)
    # every arm's episode of the same start, in the arms' order
    assert [each["arm"] for each in found["cell"]] == list(run.rollouts[KEY].manifest["arms"])
    for each in found["cell"]:
        other = episodes.get_episode(run, KEY, str(each["episode"]))
        assert (other["task"], other["seed"]) == (found["task"], found["seed"])


def test_an_answer_waits_only_for_an_index_that_is_nearly_there(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    index = EpisodeIndex.of(copied, "run")

    def stuck(self: EpisodeIndex, file: Path) -> None:
        self._of = 1000
        self._stop.wait(60)

    monkeypatch.setattr(EpisodeIndex, "_build", stuck)
    began = time.monotonic()
    state = index.state(30.0)
    assert time.monotonic() - began < 10 and not state.ready and (state.done, state.of) == (0, 1000)
    index._done = 999
    began = time.monotonic()
    assert not index.state(0.3).ready and time.monotonic() - began >= 0.3
    index.close()


def test_an_index_grows_with_its_run_and_reads_only_what_is_new(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    later, aside = episode_file(copied, 3), copied.cache.parent / "aside"
    shutil.move(later, aside)
    n = len(EpisodeIndex.of(copied, "run").numbers())
    EpisodeIndex.of(copied, "run").wait()
    assert episodes.get_rollout(copied, "run")["n"] == n
    read: list[int] = []
    real = EpisodeIndex._read

    def noted(self: EpisodeIndex, numbers: list[int]) -> object:
        read.extend(numbers)
        return real(self, numbers)

    monkeypatch.setattr(EpisodeIndex, "_read", noted)
    time.sleep(0.02)
    shutil.move(aside, later)
    EpisodeIndex.of(copied, "run").wait()
    assert episodes.get_rollout(copied, "run")["n"] == n + 1
    assert read == [3]
    assert len(list((copied.cache / "episodes").glob("*.parquet"))) == 1


def test_a_damaged_file_is_told_and_leaves_the_others(copied: Run) -> None:
    episode_file(copied, 1).write_bytes(b"PAR1 not a table PAR1")
    pq.write_table(pq.ParquetFile(episode_file(copied, 2)).read().select(["episode", "arm"]), episode_file(copied, 2))
    EpisodeIndex.of(copied, "run").wait()
    rows = episodes.get_page(copied, "run", "1")["rows"]
    assert [row["episode"] for row in rows if row["damage"]] == [1, 2]
    assert episodes.find_episodes(copied, "run", outcome="damaged")["n"] == 2
    assert sum(rate["episodes"] for rate in episodes.get_rollout(copied, "run")["rates"] if rate["task"] is None) == (
        len(rows) - 2
    )
    with pytest.raises(NotThere, match="damaged"):
        episodes.get_episode(copied, "run", "1")
    episode_file(copied, 3, "steps").write_bytes(b"")
    with pytest.raises(NotThere, match="cannot be read"):
        episodes.get_episode(copied, "run", "3")


def test_nothing_outside_of_the_run_is_read(copied: Run, tmp_path: Path) -> None:
    shutil.move(episode_file(copied, 0), tmp_path / "outside.parquet")
    os.symlink(tmp_path / "outside.parquet", episode_file(copied, 0))
    with pytest.raises(NotThere):
        episodes.get_episode(copied, "run", "0")
    with pytest.raises(NotThere):
        films.get_film(copied, "run", "0")
    assert 0 not in EpisodeIndex.of(copied, "run").numbers()
    for text in ("../../../etc/passwd", "-1", "1e3", "٣", "9999999999", ""):
        with pytest.raises(NotThere):
            episodes.get_episode(copied, "run", text)
    with pytest.raises(NotThere, match="no rollouts"):
        episodes.get_rollout(copied, "../run")


@pytest.mark.parametrize(
    ("entry", "value"), [("scenes", "x"), ("scenes", [["red-orange"]]), ("arms", {}), ("suite", {}), ("model", None)]
)
def test_a_manifest_that_says_too_little_is_named(copied: Run, tmp_path: Path, entry: str, value: object) -> None:
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text()) | {entry: value}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    run = Run.open(tmp_path / "run", cache=tmp_path / "other")
    assert "manifest.json" in episodes.list_rollouts(run)[0]["error"]
    with pytest.raises(NotThere, match="cannot be shown"):
        episodes.get_rollout(run, "run")
    assert list(episodes.exported_episodes(run)) == []


def test_arms_are_told_in_a_line() -> None:
    assert arm_text({"kind": "baseline"}) == "no edit"
    told = ToldArm("a", [Told({Scene("t", 1): "go left", Scene("t", 2): "go right"}), Told(None, 8)])
    about = json.loads(json.dumps(told.describe()))
    assert arm_text(about) == "told “go left” / “go right”, then its own instruction from step 8"
    assert told_text(about, "t", 2) == [{"start": 0, "text": "go right"}, {"start": 8, "text": None}]
    image = ImageArm("i", "blur", 2.0, ("top",)).describe()
    assert arm_text(image) == "pictures of top changed: blur, strength 2"
    edit = json.loads(json.dumps(EditArm("e", [Ablate("vlm.blocks.0.hook_resid_post", "zero")]).describe()))
    assert arm_text(edit).startswith("Ablate at vlm.blocks.0.hook_resid_post")
    assert "sleep" in arm_text({"kind": "sleep", "for": list(range(100))})
    assert shortened(list(range(100)))[-1] == "… 94 more"


def test_a_film_shows_every_step_and_the_end(run: Run, main_folder: Path) -> None:
    about = films.get_film(run, KEY, "1")
    n = episodes.get_episode(run, KEY, "1")["n_steps"]
    assert (about["error"], about["cameras"], about["n_frames"]) == (None, ["top", "wrist"], n + 1)
    video = films.get_video(run, KEY, "1", "0")
    file = run.cache / "seen.mp4"
    file.write_bytes(video.content)
    frames = read_film(file)
    assert frames.shape == (n + 1, films.SIZE, films.SIZE, 3)
    assert np.abs(frames[-1].astype(int) - frames[0]).max() > 50
    began = time.monotonic()
    assert films.get_film(run, KEY, "1") == about
    assert time.monotonic() - began < 0.2
    with pytest.raises(NotThere, match="no camera"):
        films.get_video(run, KEY, "1", "2")


def test_an_episode_that_comes_out_otherwise_has_no_film_and_says_why(copied: Run) -> None:
    steps = episode_file(copied, 1, "steps")
    rows = pq.ParquetFile(steps).read().to_pylist()
    rows[4]["state"][0] += 0.01
    pq.write_table(pq.ParquetFile(steps).read().from_pylist(rows, pq.read_schema(steps)), steps)
    found = films.get_film(copied, "run", "1")
    assert found["cameras"] == []
    assert "step 4: the state differs" in found["error"]
    assert episodes.get_episode(copied, "run", "1")["steps"]["n"] == len(rows)


def test_a_cache_of_films_keeps_to_its_bound(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("2", "3"):
        assert films.get_film(copied, "run", number)["error"] is None
    kept = list((copied.cache / "films").iterdir())
    assert len(kept) == 2
    monkeypatch.setattr(films, "MAX_BYTES", 1)
    films.get_film(copied, "run", "4")
    assert [each for each in (copied.cache / "films").iterdir() if each in kept] == []


def test_attention_is_that_of_the_recorded_plan(run: Run) -> None:
    number = str(len(run.rollouts[KEY].manifest["scenes"]))
    for episode in ("0", number):
        found = get_choices(run, KEY, episode, "6")
        assert found["error"] is None
        # the plan of step 6 is that of step 4, and comes out as it was recorded
        assert found["step"] == 4
        assert found["edits"]["applied"]
        assert found["apart"] < 1e-4
    assert [camera["camera"] for camera in found["cameras"]] == ["top", "wrist"]
    site = next(each for each in found["sites"] if each["site"].startswith("vlm") and each["reaches_action"])
    maps = get_attention(run, KEY, number, "4", site["site"], "language")["maps"]
    weights = [np.array(camera["weights"]) for camera in maps]
    assert all(each.shape == (1, site["n_heads"], *camera["grid"]) for each, camera in zip(weights, maps, strict=True))
    shares = sum(np.array(camera["share"]) for camera in maps)
    assert np.max(shares) < 1.001
    np.testing.assert_allclose(weights[0].sum((-2, -1)), maps[0]["share"], atol=1e-3)
    assert "no token segment" in get_attention(run, KEY, number, "4", site["site"], "nothing")["error"]
    assert "no attention" in get_attention(run, KEY, number, "4", "vlm.blocks.77.attn.hook_pattern", "all")["error"]


def test_no_attention_of_other_weights(copied: Run, tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    wrong = {"smolvla-tabletop": "has other weights", "someone/else": "not on this machine"}
    for name, weights, said in [*((name, "0" * 64, said) for name, said in wrong.items()), ("expert", None, "no net")]:
        manifest["model"] |= {"name": name, "weights": weights}
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
        assert said in get_choices(copied, "run", "0", "0")["error"]
