"""Recorded episodes run again: with images, bit for bit, and refused where they come out otherwise."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exporting import SUITE, record_run

from hooked_vla.rollouts.replay import Episode, ReplayError, replay


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield record_run(tmp_path_factory.mktemp("replay") / "run", episodes=3)


def edit(run: Path, folder: Path, kind: str, number: int, change) -> Path:
    """A copy of the run in which one episode's rows are changed."""
    copy = folder / "copy"
    for file in run.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(run)).write_bytes(file.read_bytes())
    path = copy / kind / "000" / f"{number:09d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return copy


def test_episodes_come_out_as_they_were_recorded(run):
    shown = list(replay(run, image_size=32))
    assert [each.number for each in shown] == [0, 1, 2]
    for episode in shown:
        steps = pq.read_table(run / "steps/000" / f"{episode.number:09d}.parquet")
        assert len(episode) == steps.num_rows and episode.success and episode.fps == SUITE.fps
        assert np.array_equal(episode.actions, np.array(steps["action"].to_pylist(), np.float32))
        assert np.array_equal(episode.states, np.array(steps["state"].to_pylist(), np.float32))
        assert list(episode.columns["phase"]) == steps["phase"].to_pylist()
        assert set(episode.images) == set(SUITE.cameras)
        for camera, images in episode.images.items():
            assert images.shape == (len(episode), 32, 32, 3) and images.dtype == np.uint8
            # the arm moves
            assert not np.array_equal(images[0], episode.last_images[camera])
        assert (
            episode.about["task"]
            == pq.read_table(run / "episodes/000" / f"{episode.number:09d}.parquet")["task"][0].as_py()
        )
        assert episode.rewards.sum() == 1.0 and episode.successes.sum() == 1


def test_the_images_are_those_of_the_step(run):
    episode = next(replay(run, episodes=[1], cameras=["wrist"], image_size=32))
    env = SUITE.make(episode.about["task"], ("wrist",), 32)
    obs, _ = env.reset(seed=episode.about["seed"])
    for step in range(3):
        assert np.array_equal(episode.images["wrist"][step], obs["pixels"]["wrist"])
        obs = env.step(episode.actions[step])[0]
    env.close()


def test_images_that_would_be_drawn_otherwise_are_refused(run, tmp_path):
    copy = edit(run, tmp_path, "steps", 0, lambda rows: None)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"]["cameras"], manifest["suite"]["render"] = {"camera1": "agent"}, "full"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="images drawn 'full', now they are drawn 'fast': HOOKED_VLA_RENDER decides"):
        next(replay(copy, image_size=32, suite=replace(SUITE, quality=lambda: "fast")))
    next(replay(copy, [0], image_size=32, suite=replace(SUITE, quality=lambda: "full")))


def test_wrong_requests_are_refused(run, tmp_path):
    with pytest.raises(KeyError, match=r"episodes \[7\] are not recorded"):
        list(replay(run, episodes=[0, 7]))
    with pytest.raises(ValueError, match=r"has no cameras \['front'\]; it has"):
        list(replay(run, cameras=["front"]))
    with pytest.raises(FileNotFoundError, match="not a folder of rollouts"):
        list(replay(tmp_path))


def test_an_episode_that_comes_out_otherwise_is_an_error(run, tmp_path):
    def move(rows):
        rows[4]["action"] = [-each for each in rows[4]["action"]]

    copy = edit(run, tmp_path / "a", "steps", 2, move)
    with pytest.raises(ReplayError, match=r"episode 2 \(task .*, seed 2\), step 5: the state differs: \[.*mujoco"):
        list(replay(copy, cameras=[], image_size=32))
    assert [each.number for each in replay(copy, episodes=[0, 1], cameras=[], image_size=32)] == [0, 1]

    def nudge(rows):
        rows[3]["state"] = [rows[3]["state"][0] + 1e-4, *rows[3]["state"][1:]]

    copy = edit(run, tmp_path / "b", "steps", 0, nudge)
    with pytest.raises(ReplayError, match="step 3: the state differs.*0.0001 apart"):
        list(replay(copy, episodes=[0], cameras=[]))
    assert len(list(replay(copy, episodes=[0], cameras=[], tolerance=1e-3))) == 1

    for kind, change, message in (
        ("steps", lambda rows: rows[-1].update(success=False), "the success differs: False was recorded, now True"),
        ("steps", lambda rows: rows[0].update(reward=0.5), r"step 0: the reward differs: \[0.5\] was recorded"),
        ("episodes", lambda rows: rows[0].update(final_state=[0.0] * 4), "the state differs"),
        ("episodes", lambda rows: rows[0].update(instruction="dance"), "the instruction differs: 'dance' was recorded"),
    ):
        copy = edit(run, tmp_path / message[:12] / kind, kind, 0, change)
        with pytest.raises(ReplayError, match=message):
            list(replay(copy, episodes=[0], cameras=[]))


def test_what_the_policy_saw_is_drawn_by_default(run, tmp_path):
    copy = edit(run, tmp_path, "steps", 0, lambda rows: None)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"] |= {"cameras": {"observation.image": "agent"}, "image_size": 40}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    episode = next(replay(copy, episodes=[0]))
    assert {camera: images.shape[1:] for camera, images in episode.images.items()} == {"agent": (40, 40, 3)}


def test_an_episode_is_as_long_everywhere(run):
    episode = next(replay(run, episodes=[0], cameras=[]))
    with pytest.raises(ValueError, match=rf"episode 0 has {len(episode)} actions, but {{'phase': 1}}"):
        replace(episode, columns={"phase": ["lift"]})
    with pytest.raises(ValueError, match="needs at least one"):
        Episode(0, "", 20, {}, np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), np.zeros(0),
                np.zeros(0, bool), {}, np.zeros(4, np.float32))  # fmt: skip
