"""Rollouts and LeRobot: it loads our data sets as its own, and drives our policies in its evaluation loop.

Needs LeRobot 0.6.1 with its `dataset` extra, and the simulator; skipped without them. Its own writer makes the same
data set beside ours, and both must read alike.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lerobot_compat as lerobot
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hooked_vla import HookedVLA, Observation

sys.path.insert(0, str(Path(__file__).parent.parent / "rollouts"))

try:
    lerobot.install()
    LeRobotDataset = importlib.import_module("lerobot.datasets.lerobot_dataset").LeRobotDataset
    from exporting import SUITE, record_run
except ImportError as error:
    pytest.skip(f"LeRobot {lerobot.VERSION} with data sets, and a simulator: {error}", allow_module_level=True)

from hooked_vla.rollouts.export_lerobot import write_lerobot
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.replay import Episode, replay

pytestmark = pytest.mark.filterwarnings("ignore")

CAMERAS = ("agent", "wrist")
KEYS = {f"observation.images.{camera}": camera for camera in CAMERAS}


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    run = record_run(tmp_path_factory.mktemp("live") / "run", episodes=4)
    return list(replay(run, cameras=CAMERAS, image_size=64))


@pytest.fixture(scope="module")
def ours(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # small files, so that episodes lie in several
    return write_lerobot(tmp_path_factory.mktemp("ours") / "set", episodes, data_bytes=4000, video_bytes=20_000)


@pytest.fixture(scope="module")
def theirs(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("theirs") / "set"
    features: dict[str, Any] = {
        key: {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]} for key in KEYS
    }
    features |= {key: {"dtype": "float32", "shape": (4,), "names": None} for key in ("observation.state", "action")}
    features |= {
        "phase": {"dtype": "string", "shape": (1,), "names": None},
        "chunk": {"dtype": "int64", "shape": (1,), "names": None},
        "chunk_step": {"dtype": "int64", "shape": (1,), "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    made = LeRobotDataset.create("local/theirs", fps=SUITE.fps, features=features, root=root, use_videos=True)
    for episode in episodes:
        for i in range(len(episode)):
            frame = {key: episode.images[camera][i] for key, camera in KEYS.items()}
            frame |= {"observation.state": episode.states[i], "action": episode.actions[i], "task": episode.instruction}
            frame |= {"phase": episode.columns["phase"][i], "next.reward": np.array([episode.rewards[i]], np.float32)}
            frame |= {key: np.array([episode.columns[key][i]], np.int64) for key in ("chunk", "chunk_step")}
            frame |= {"next.success": episode.successes[i : i + 1], "next.done": np.array([i + 1 == len(episode)])}
            made.add_frame(frame)
        made.save_episode(parallel_encoding=False)
    made.finalize()
    yield root


def test_lerobot_reads_every_step(ours, episodes):
    data = LeRobotDataset("local/ours", root=ours)
    assert (data.num_episodes, data.num_frames, data.fps) == (4, sum(map(len, episodes)), SUITE.fps)
    at = 0
    for number, episode in enumerate(episodes):
        for i in (0, len(episode) // 2, len(episode) - 1):
            item = data[at + i]
            assert item["episode_index"] == number and item["frame_index"] == i and item["index"] == at + i
            assert item["task"] == episode.instruction and item["phase"] == episode.columns["phase"][i]
            assert np.array_equal(item["action"], episode.actions[i])
            assert np.array_equal(item["observation.state"], episode.states[i])
            assert bool(item["next.done"]) == (i + 1 == len(episode))
            for key, camera in KEYS.items():
                wanted = torch.from_numpy(episode.images[camera][i]).permute(2, 0, 1) / 255
                assert (item[key] - wanted).abs().mean() < 0.03
        at += len(episode)


def test_lerobot_reads_windows_and_single_episodes(ours, episodes):
    step = 1 / SUITE.fps
    deltas = {"action": [0.0, step, 2 * step], "observation.images.wrist": [-step, 0.0]}
    data = LeRobotDataset("local/ours", root=ours, episodes=[1, 3], delta_timestamps=deltas)
    assert data.num_episodes == 2
    item = data[len(episodes[1]) + 4]
    assert item["episode_index"] == 3
    assert np.array_equal(item["action"], episodes[3].actions[4:7])
    wanted = torch.from_numpy(episodes[3].images["wrist"][3:5]).permute(0, 3, 1, 2) / 255
    assert (item["observation.images.wrist"] - wanted).abs().mean() < 0.03


def test_our_files_are_like_those_of_lerobots_writer(ours, theirs):
    infos = [json.loads((root / "meta/info.json").read_text()) for root in (ours, theirs)]
    assert set(infos[0]) == set(infos[1])
    same = ("codebase_version", "fps", "total_episodes", "total_frames", "total_tasks", "chunks_size", "data_path",
            "video_path", "splits", "robot_type")  # fmt: skip
    assert {key: infos[0][key] for key in same} == {key: infos[1][key] for key in same}
    features = [
        {key: (each["dtype"], each["shape"], each["names"]) for key, each in info["features"].items()} for info in infos
    ]
    assert features[0] == features[1]
    for key in KEYS:
        # how the films were encoded differs, not what is said of them
        assert set(infos[0]["features"][key]["info"]) <= set(infos[1]["features"][key]["info"])
    schemas = [pq.read_schema(root / "data/chunk-000/file-000.parquet") for root in (ours, theirs)]
    assert {f.name: f.type for f in schemas[0]} == {f.name: f.type for f in schemas[1]}
    rows = [pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").schema for root in (ours, theirs)]
    assert {f.name for f in rows[1]} <= {f.name for f in rows[0]}
    tables = [pq.read_table(root / "meta/tasks.parquet").to_pydict() for root in (ours, theirs)]
    assert tables[0] == tables[1]


def test_our_statistics_are_lerobots(ours, theirs):
    first, second = (LeRobotDataset("local/set", root=root).meta.stats for root in (ours, theirs))
    assert set(first) == set(second)
    for key in first:
        assert set(first[key]) == set(second[key])
        for name, value in first[key].items():
            assert value.shape == second[key][name].shape, (key, name)
            if name == "count" and key in KEYS:
                continue
            # its quantiles are read off a histogram; images are sampled by it
            spread = np.maximum(second[key]["max"] - second[key]["min"], 1e-6)
            loose = 0.1 if name.startswith("q") else 0.02 if key in KEYS else 1e-4
            assert (np.abs(value - second[key][name]) <= loose * np.atleast_1d(spread)).all(), (key, name)


class Vector:
    """What LeRobot's loop asks of a vector environment, around environments of the suite."""

    def __init__(self, tasks: list[str], max_steps: int) -> None:
        import gymnasium

        self.num_envs, self.max_steps = len(tasks), max_steps
        self.envs = [SUITE.make(task, CAMERAS, 64) for task in tasks]
        self.unwrapped, self.metadata = self, {"render_fps": SUITE.fps}
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.actions: list[np.ndarray] = []

    def reset(self, seed: list[int], options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._observe([env.reset(seed=each)[0] for env, each in zip(self.envs, seed, strict=True)]), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.actions.append(actions)
        steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        flags = [np.array([step[i] for step in steps]) for i in (1, 2, 3)]
        return self._observe([step[0] for step in steps]), *flags, {}

    def call(self, name: str) -> list[Any]:
        if name == "_max_episode_steps":
            return [self.max_steps] * self.num_envs
        if name == "task_description":
            return [env.unwrapped.instruction for env in self.envs]
        raise AttributeError(name)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _observe(self, seen: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = {camera: np.stack([each["pixels"][camera] for each in seen]) for camera in CAMERAS}
        return {"pixels": pixels, "agent_pos": np.stack([each["state"] for each in seen])}


@pytest.mark.parametrize("name", ["smolvla", "pi05"])
def test_lerobots_loop_drives_a_hooked_policy(name, monkeypatch):
    """Its contract is reset, select_action and nothing else; the processors are the policy's own."""
    try:
        evaluation = importlib.import_module("lerobot.scripts.lerobot_eval")
    except ImportError as error:
        pytest.skip(f"LeRobot's evaluation script: {error}")
    monkeypatch.setattr(evaluation, "check_env_attributes_and_types", lambda env: None)
    model = HookedVLA.from_spec(name, "tiny", seed=0)
    env, tasks = Vector(["red-orange", "blue-cyan"], max_steps=10), 2

    def same(batch: Any) -> Any:
        return batch

    torch.manual_seed(0)
    done = evaluation.rollout(env, model, same, same, same, same, seeds=[3, 4])
    assert done["action"].shape == (tasks, 10, 4)

    # the same by hand: a chunk, of which n_action_steps are taken, then the next
    torch.manual_seed(0)
    plain, taken = Vector(["red-orange", "blue-cyan"], 10), []
    seen = plain.reset([3, 4])[0]
    while len(taken) < 10:
        obs = Observation(seen["pixels"], seen["agent_pos"], plain.call("task_description"))
        for action in model.predict_action_chunk(obs)[:, : model.spec.features.n_action_steps].unbind(1):
            taken.append(action.numpy())
            seen = plain.step(action.numpy())[0]
    assert np.allclose(np.stack(env.actions), np.stack(taken[:10]), atol=1e-5)
    env.close()
    plain.close()


def test_the_contract_of_lerobots_policies():
    """What `PreTrainedPolicy` asks of a policy that acts, with the batch that LeRobot gives it."""
    base = importlib.import_module("lerobot.policies.pretrained").PreTrainedPolicy
    acting = {"reset", "select_action", "predict_action_chunk"}
    assert acting <= set(base.__abstractmethods__)
    model = HookedVLA.from_spec("smolvla", "tiny", seed=0)
    batch = {key: torch.rand(2, 3, 64, 64) for key in KEYS}
    batch |= {"observation.state": torch.zeros(2, 4), "task": ["lift", "push"]}
    noise = SeededNoise.of(model, {key: value[:1] for key, value in batch.items()})([1, 2], 0)
    with torch.inference_mode():
        chunk = model.predict_action_chunk(batch, noise=noise)
        model.reset()
        actions = [model.select_action(batch, noise=noise) for _ in range(model.spec.features.n_action_steps)]
    assert chunk.shape == (2, 8, 4) and torch.equal(torch.stack(actions, dim=1), chunk)
