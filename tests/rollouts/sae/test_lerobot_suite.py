"""Data sets played back: what is shown is what was recorded, and a policy sees it as in any rollout."""

import io
import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tolerance import assert_close

from hooked_vla import Observation
from hooked_vla.rollouts.export_lerobot import write_lerobot
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.replay import Episode
from hooked_vla.rollouts.sae.collect import DatasetSource, collect_dataset
from hooked_vla.rollouts.sae.lerobot_suite import LeRobotFolder, PlaybackEnv, episode_scenes, lerobot_suite
from hooked_vla.rollouts.settings import Options, constant_text
from hooked_vla.sae.rows import NONE
from hooked_vla.sae.store import TokenStore

sys.path.insert(0, str(Path(__file__).parent.parent))
from toy_suite import tiny

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
LENGTHS = (9, 6, 11, 8)
OPTIONS = Options(n_envs=2, n_action_steps=4)
CAMERAS = ("agent", "wrist")


def episode(number: int, n: int) -> Episode:
    """Frames of one colour each, which survive the film and say where they belong."""
    shades = {c: 10 * number + 12 * np.arange(n) + 5 * i for i, c in enumerate(CAMERAS)}
    draw = np.random.default_rng(number)
    return Episode(
        number=number, instruction=f"task {number % 2}", fps=10,
        images={c: np.broadcast_to(s[:, None, None, None], (n, 32, 32, 3)).astype(np.uint8) for c, s in shades.items()},
        states=draw.normal(size=(n, 4)).astype(np.float32), actions=draw.normal(size=(n, 4)).astype(np.float32),
        rewards=np.zeros(n), successes=np.arange(n) == (n - 1 if number else n),
        last_images={c: np.zeros((32, 32, 3), np.uint8) for c in CAMERAS}, last_state=np.zeros(4, np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    # small files: episodes are spread over several, and several are in one
    return write_lerobot(out, (episode(i, n) for i, n in enumerate(LENGTHS)), data_bytes=3000, video_bytes=1500)


def test_every_frame_is_the_recorded_one(folder):
    suite = lerobot_suite(folder)
    assert suite.cameras == CAMERAS and (suite.d_state, suite.d_action, suite.fps, suite.max_steps) == (4, 4, 10, 11)
    for number in (2, 0, 3, 1):
        expected = episode(number, LENGTHS[number])
        env = suite.make(f"episode-{number:06d}", CAMERAS, 1)
        obs, info = env.reset(seed=number)
        for step in range(len(expected)):
            assert obs["instruction"] == expected.instruction and np.array_equal(obs["state"], expected.states[step])
            for camera in CAMERAS:
                shade = obs["pixels"][camera].astype(int)
                assert np.abs(shade - expected.images[camera][step].astype(int)).max() <= 3, (number, step, camera)
            assert not info["is_success"]
            last = obs
            obs, _, terminated, truncated, info = env.step(np.zeros(4))
            assert not terminated and truncated == (step == len(expected) - 1)
        assert info["is_success"] == (number > 0) and np.array_equal(obs["pixels"]["wrist"], last["pixels"]["wrist"])
        env.close()


def test_frames_that_nobody_looks_at_are_passed_over(folder):
    env = PlaybackEnv(LeRobotFolder(folder), 2, CAMERAS)
    env.reset()
    env.cameras = ()
    for _ in range(6):
        assert env.step(None)[0]["pixels"] == {}
    env.cameras = ("wrist",)
    shown = env.step(None)[0]["pixels"]
    assert list(shown) == ["wrist"] and abs(int(shown["wrist"][0, 0, 0]) - (20 + 12 * 7 + 5)) <= 3


def test_images_in_the_tables_are_read_too(folder, tmp_path):
    """A data set with an image column, of bytes and of a path."""
    shutil.copytree(folder, tmp_path / "set")
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    info["features"]["observation.images.agent"]["dtype"] = "image"
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    (tmp_path / "set/pictures").mkdir()
    for path in (tmp_path / "set/data").rglob("*.parquet"):
        table, cells = pq.read_table(path), []
        for row in table.select(["episode_index", "frame_index"]).to_pylist():
            number, frame = row["episode_index"], row["frame_index"]
            content = png(episode(number, LENGTHS[number]).images["agent"][frame])
            name = f"pictures/{number}-{frame}.png"
            (tmp_path / "set" / name).write_bytes(content)
            cells.append({"bytes": content, "path": None} if frame % 2 else {"bytes": None, "path": name})
        pq.write_table(table.append_column("observation.images.agent", pa.array(cells)), path)
    env = PlaybackEnv(LeRobotFolder(tmp_path / "set"), 3, CAMERAS)
    obs, _ = env.reset()
    for step in range(LENGTHS[3]):
        assert np.array_equal(obs["pixels"]["agent"], episode(3, LENGTHS[3]).images["agent"][step])
        obs = env.step(None)[0]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as out:
        stream = out.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "rgb24"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")), *stream.encode()]:
            out.mux(packet)
    return file.getvalue()


def test_rows_are_what_a_direct_run_of_that_frame_gives(folder, tmp_path):
    model = tiny("smolvla")
    store = collect_dataset(model, folder, [VLM, EXPERT], tmp_path / "s", options=OPTIONS)
    assert isinstance(store, TokenStore) and store.complete and store.episodes == [0, 1, 2, 3]
    planned = {(number, frame) for number, n in enumerate(LENGTHS) for frame in range(0, n, 4)}
    shown = {
        (number, frame): obs
        for number, n in enumerate(LENGTHS)
        for frame, obs in enumerate(frames(LeRobotFolder(folder), number, n))
    }
    for site in (VLM, EXPERT):
        ids = store.ids(site)
        assert {tuple(row) for row in ids[:, :2].tolist()} == planned
        rows = torch.from_numpy(np.random.default_rng(0).choice(len(ids), 8, replace=False))
        for row, values in zip(rows, store.read(site, rows), strict=True):
            number, frame, denoise, _, _, position = ids[row].tolist()
            obs = shown[number, frame]
            obs = Observation(obs["pixels"], obs["state"], obs["instruction"])
            with constant_text(model.processor, True), torch.no_grad():
                noise = SeededNoise.of(model, obs)([number], frame)
                _, cache = model.run_with_cache(obs, site, noise=noise)
            value = cache[site] if denoise == NONE else cache[site][denoise]
            assert_close(values, value.flatten(0, 1)[position])


def frames(dataset: LeRobotFolder, number: int, n: int) -> list[dict]:
    env = PlaybackEnv(dataset, number, CAMERAS)
    first = env.reset()[0]
    return [first, *(env.step(None)[0] for _ in range(n - 1))]


def test_a_source_goes_through_the_episodes_in_passes(folder):
    def source(**settings):
        return DatasetSource(tiny("smolvla"), folder, VLM, seed=0, buffer_rows=4096, options=OPTIONS, **settings)

    once = list(source(passes=1).batches(100))
    n_plans = sum(-(-n // 4) for n in LENGTHS)
    n_rows = sum(len(batch[VLM]) for batch in once)
    assert n_rows % n_plans == 0 and sum(len(b[VLM]) for b in source(passes=2).batches(100)) == 2 * n_rows
    some = source(episodes=[3, 1], passes=1)
    assert {cell.id for cell in some.cells(0)} == {1, 3} and some.cells(1) is None
    first, second = source(), source()
    orders = [[cell.id for unit in (2 * n, 2 * n + 1) for cell in first.cells(unit)] for n in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len({tuple(order) for order in orders}) > 1
    next(batches := first.batches(100))
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(second.batches(100))[VLM], next(batches)[VLM])
    with pytest.raises(ValueError, match=r"episodes \[0, 1, 2, 3\] instead of \[1, 3\]"):
        some.load_state_dict(first.state_dict())


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no meta/info.json in .*not a LeRobotDataset"):
        lerobot_suite(tmp_path)
    with pytest.raises(ValueError, match=r"has episodes 0\.\.3, asked for \[9\]"):
        DatasetSource(tiny("smolvla"), folder, VLM, episodes=[9])
    with pytest.raises(ValueError, match="has 4 episodes, asked for 5"):
        episode_scenes(lerobot_suite(folder), 5)
    with pytest.raises(ValueError, match=r"has no camera 'front'; it has \['agent', 'wrist'\]"):
        LeRobotFolder(folder).key("front")
    with pytest.raises(KeyError, match="no episode 7"):
        LeRobotFolder(folder).read(7, CAMERAS)
    shutil.copytree(folder, tmp_path / "set")
    film = max((tmp_path / "set/videos/observation.images.agent").rglob("*.mp4"))
    film.write_bytes(b"no film")
    with pytest.raises(ValueError, match=rf"{film} is missing, truncated, or not a film"):
        PlaybackEnv(LeRobotFolder(tmp_path / "set"), 3, CAMERAS).reset()
    info = json.loads((folder / "meta/info.json").read_text())
    for change, said in (({"codebase_version": "v2.1"}, "LeRobotDataset v2.1; this reads v3"),
                         ({"features": {}}, "needs images .* and 'action'")):  # fmt: skip
        (tmp_path / "set/meta/info.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=said):
            LeRobotFolder(tmp_path / "set")
    del info["fps"]
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"info.json is damaged: it does not say \['fps'\]"):
        LeRobotFolder(tmp_path / "set")


def test_a_film_that_does_not_have_the_frame_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    path = min((tmp_path / "set/meta/episodes").rglob("*.parquet"))
    table = pq.read_table(path)
    for name in [name for name in table.column_names if name.endswith("from_timestamp")]:
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value.as_py() + 100 for value in table[name]]))
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"ends before 10\d\.\d+ s, where a frame of episode 0 is due"):
        PlaybackEnv(LeRobotFolder(tmp_path / "set"), 0, CAMERAS).reset()
