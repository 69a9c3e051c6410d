"""LeRobotDataset v3 as LeRobot lays it out; tests/live loads the same with LeRobot itself."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from exporting import SUITE, record_run

from hooked_vla.rollouts.export import export_run
from hooked_vla.rollouts.export_lerobot import write_lerobot
from hooked_vla.rollouts.replay import Episode, replay
from hooked_vla.rollouts.video import read_film

AGENT = "observation.images.agent"


def episode(number: int = 0, n: int = 5, **changes) -> Episode:
    draw = np.random.default_rng(number)
    made = Episode(
        number=number, instruction=f"task {number % 2}", fps=10,
        images={"agent": np.full((n, 32, 48, 3), 20 * number + np.arange(n)[:, None, None, None], np.uint8)},
        states=draw.normal(size=(n, 3)).astype(np.float32), actions=draw.normal(size=(n, 2)).astype(np.float32),
        rewards=np.linspace(0, 1, n), successes=np.arange(n) == n - 1,
        last_images={"agent": np.zeros((32, 48, 3), np.uint8)}, last_state=np.zeros(3, np.float32),
        columns={"phase": ["reach"] * (n - 1) + ["done"], "chunk": list(range(n))},
        about={"seed": number, "success": True},
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def written(tmp_path) -> Path:
    lengths = (5, 4, 6)
    return write_lerobot(tmp_path / "set", (episode(i, n) for i, n in enumerate(lengths)), robot_type="cup")


def read(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / name).to_pylist()


def test_info_says_what_there_is(written):
    info = json.loads((written / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 10, "cup")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert info["splits"] == {"train": "0:3"} and info["chunks_size"] == 1000
    shapes = {key: (each["dtype"], each["shape"]) for key, each in info["features"].items()}
    assert shapes == {
        AGENT: ("video", [32, 48, 3]), "observation.state": ("float32", [3]), "action": ("float32", [2]),
        "phase": ("string", [1]), "chunk": ("int64", [1]), "next.reward": ("float32", [1]),
        "next.success": ("bool", [1]), "next.done": ("bool", [1]), "timestamp": ("float32", [1]),
        "frame_index": ("int64", [1]), "episode_index": ("int64", [1]), "index": ("int64", [1]),
        "task_index": ("int64", [1]),
    }  # fmt: skip
    film = info["features"][AGENT]
    assert film["names"] == ["height", "width", "channels"]
    assert (film["info"]["video.codec"], film["info"]["video.fps"], film["info"]["video.width"]) == ("h264", 10, 48)
    for kind in ("data_path", "video_path"):
        assert (written / info[kind].format(video_key=AGENT, chunk_index=0, file_index=0)).is_file()


def test_steps_are_rows(written):
    rows = read(written, "data/chunk-000/file-000.parquet")
    assert [row["index"] for row in rows] == list(range(15))
    assert [row["episode_index"] for row in rows] == [0] * 5 + [1] * 4 + [2] * 6
    assert [row["frame_index"] for row in rows[5:9]] == [0, 1, 2, 3]
    assert [row["timestamp"] for row in rows[5:9]] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [row["task_index"] for row in rows] == [0] * 5 + [1] * 4 + [0] * 6
    second = episode(1, 4)
    assert np.array_equal([row["action"] for row in rows[5:9]], second.actions)
    assert np.array_equal([row["observation.state"] for row in rows[5:9]], second.states)
    assert [row["phase"] for row in rows[5:9]] == ["reach", "reach", "reach", "done"]
    assert (
        [row["next.done"] for row in rows[5:9]] == [False, False, False, True] == [r["next.success"] for r in rows[5:9]]
    )
    # one row group an episode
    assert pq.ParquetFile(written / "data/chunk-000/file-000.parquet").num_row_groups == 3


def test_episodes_say_where_they_are(written):
    rows = read(written, "meta/episodes/chunk-000/file-000.parquet")
    assert [row["length"] for row in rows] == [5, 4, 6]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 9), (9, 15)]
    assert [row["tasks"] for row in rows] == [["task 0"], ["task 1"], ["task 0"]]
    assert [row["run_episode"] for row in rows] == [0, 1, 2] == [row["seed"] for row in rows]
    film = read_film(written / f"videos/{AGENT}/chunk-000/file-000.mp4")
    assert len(film) == 15
    for number, row in enumerate(rows):
        start, stop = (round(10 * row[f"videos/{AGENT}/{end}_timestamp"]) for end in ("from", "to"))
        assert stop - start == row["length"]
        # every frame has its own grey
        grey = film[start:stop].mean(axis=(1, 2, 3))
        assert grey == pytest.approx(20 * number + np.arange(row["length"]), abs=3)
        assert row["stats/action/mean"] == pytest.approx(episode(number, row["length"]).actions.mean(0), abs=1e-6)


def test_tasks_carry_pandas_index(written):
    table = pq.read_table(written / "meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["task 0", "task 1"]}
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_statistics_are_of_all_steps(written):
    stats = json.loads((written / "meta/stats.json").read_text())
    actions = np.concatenate([episode(i, n).actions for i, n in enumerate((5, 4, 6))])
    assert stats["action"]["mean"] == pytest.approx(actions.mean(0), abs=1e-6)
    assert stats["action"]["std"] == pytest.approx(actions.std(0), abs=1e-6) and stats["action"]["count"] == [15]
    assert set(stats["action"]) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert np.shape(stats[AGENT]["mean"]) == (3, 1, 1) and stats[AGENT]["max"][0][0][0] == pytest.approx(45 / 255)
    assert "phase" not in stats and stats["index"]["max"] == [14]


def test_large_files_go_on_in_the_next(tmp_path):
    draw = np.random.default_rng(0)
    episodes = [
        episode(i, 10, images={"agent": draw.integers(0, 256, (10, 96, 96, 3), dtype=np.uint8)}) for i in range(6)
    ]
    # an episode's film takes about 70 kB
    folder = write_lerobot(tmp_path / "set", episodes, data_bytes=1, video_bytes=100_000)
    rows = [row for i in range(6) for row in read(folder, f"meta/episodes/chunk-000/file-{i:03d}.parquet")]
    assert [row["meta/episodes/file_index"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["data/file_index"] for row in rows] == [0, 1, 2, 3, 4, 5]
    files = [row[f"videos/{AGENT}/file_index"] for row in rows]
    assert files == sorted(files) and files.count(0) > 1 and set(files) == set(range(max(files) + 1)) > {0}
    for row in rows:
        film = folder / f"videos/{AGENT}/chunk-000/file-{row[f'videos/{AGENT}/file_index']:03d}.mp4"
        start = round(10 * row[f"videos/{AGENT}/from_timestamp"])
        # brightness, which is not stored at half the resolution as colour is
        light = [part.mean(axis=-1).ravel() for part in (read_film(film)[start : start + 10], images_of(episodes, row))]
        assert np.corrcoef(*light)[0, 1] > 0.8


def images_of(episodes: list[Episode], row: dict) -> np.ndarray:
    return episodes[row["episode_index"]].images["agent"]


def test_the_same_episodes_give_the_same_bytes(tmp_path, written):
    again = write_lerobot(tmp_path / "again", (episode(i, n) for i, n in enumerate((5, 4, 6))), robot_type="cup")
    files = sorted(file.relative_to(written) for file in written.rglob("*") if file.is_file())
    assert len(files) == 6 and all((written / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_a_policy_without_state_or_cameras(tmp_path):
    plain = episode(images={}, last_images={}, states=np.zeros((5, 0), np.float32), columns={},
                    last_state=np.zeros(0, np.float32))  # fmt: skip
    folder = write_lerobot(tmp_path / "set", [plain])
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["video_path"] is None and "observation.state" not in info["features"]
    assert not (folder / "videos").exists()


@pytest.mark.parametrize(
    ("episodes", "error", "message"),
    [
        (lambda: [], ValueError, "no episodes to write"),
        (lambda: [episode(), episode(1, fps=20)], ValueError, r"episode 1 does not fit the data set in \['fps'\]"),
        (
            lambda: [episode(), episode(1, actions=np.zeros((5, 7), np.float32))],
            ValueError, r"episode 1 does not fit the data set in \['action'\].*\[7\].*not.*\[2\]",
        ),
        (lambda: [episode(), episode(1, columns={})], ValueError, r"in \['chunk', 'phase'\]"),
        (lambda: [episode(columns={"action": [1] * 5})], ValueError, "a column 'action' of its own"),
        (lambda: [episode(columns={"x": [b"a"] * 5})], ValueError, "column 'x' must hold numbers or strings"),
        (lambda: [episode(columns={"x": np.zeros((5, 2))})], ValueError, "column 'x' needs one value a step"),
    ],
)  # fmt: skip
def test_episodes_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, episodes, error, message):
    with pytest.raises(error, match=message):
        write_lerobot(tmp_path / "set", episodes())
    assert not [*tmp_path.iterdir()]


def test_a_data_set_is_not_written_over(tmp_path, written):
    with pytest.raises(FileExistsError, match="is there already"):
        write_lerobot(written, [episode()])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield record_run(tmp_path_factory.mktemp("export") / "run", episodes=2)


def test_a_run_becomes_a_data_set(run, tmp_path):
    seen = []
    [folder] = export_run(run, "lerobot", tmp_path / "set", cameras=["agent"], image_size=32, on_episode=seen.append)
    assert [each.number for each in seen] == [0, 1]
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["total_frames"] == sum(len(each) for each in seen) and info["fps"] == SUITE.fps
    rows = read(folder, "data/chunk-000/file-000.parquet")
    assert np.array_equal([row["action"] for row in rows], np.concatenate([each.actions for each in seen]))
    assert {row["phase"] for row in rows} >= {"approach", "transport"}
    tasks = pq.read_table(folder / "meta/tasks.parquet")["task"].to_pylist()
    assert tasks == list(dict.fromkeys(each.instruction for each in replay(run, cameras=[])))


def test_a_run_becomes_films(run, tmp_path):
    files = export_run(run, "mp4", tmp_path / "films", cameras=["agent", "wrist"], image_size=32)
    assert [file.name for file in files] == ["episode-000000000.mp4", "episode-000000001.mp4"]
    first = next(replay(run, episodes=[0], cameras=[]))
    assert read_film(files[0]).shape == (len(first) + 1, 32, 64, 3)


def test_wrong_exports_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"unknown format 'zarr'; formats: \['lerobot', 'rerun', 'mp4'\]"):
        export_run(run, "zarr", tmp_path / "a")
    with pytest.raises(ValueError, match="cameras of one height side by side, got no cameras"):
        export_run(run, "mp4", tmp_path / "a", cameras=[])
    with pytest.raises(KeyError, match=r"episodes \[9\] are not recorded"):
        export_run(run, "lerobot", tmp_path / "a", episodes=[0, 9])
    assert not [*tmp_path.iterdir()]
