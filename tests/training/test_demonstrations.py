import numpy as np
import pytest

from hooked_vla.rollouts.tabletop import TASKS, TabletopEnv
from hooked_vla.training.dataset import gather, load_shards, save_shard
from hooked_vla.training.demonstrations import Recorder, expert_chunk
from hooked_vla.training.frames import OBJECTS, load_frames, object_places, project, record_frames, save_frames

CAMERAS = ("top", "wrist")


def recorder(seed: int = 0, keep: float = 0.2) -> Recorder:
    return Recorder({"goal": 0.7, "object": 0.3}, CAMERAS, 32, chunk=4, seed=seed, keep=keep)


def test_same_seed_records_the_same_moments():
    first, again, other = (
        gather(each.episodes(2), each.names, 12, lambda n: None) for each in (recorder(), recorder(), recorder(1))
    )
    for name in ("images", "state", "chunk", "goal", "task", "episode"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert not np.array_equal(first.state, other.state)


def test_a_scene_that_is_retold_says_nothing_of_what_is_meant():
    """Moments of one episode are told several tasks, of one block while one is held; the label is each task's own."""
    source = Recorder({"goal": 1.0}, CAMERAS, 32, chunk=1, seed=3, keep=1.0, retold=1.0)
    (moments,) = next(source.episodes(1))
    tasks = [source.names[moment.task][1].split("-") for moment in moments]
    held = [moment.state[3] > 0 for moment in moments]
    assert len({block for (block, _), holds in zip(tasks, held, strict=True) if not holds}) == 4
    assert len({block for (block, _), holds in zip(tasks, held, strict=True) if holds}) == 1 and any(held)
    assert len({pad for (_, pad), holds in zip(tasks, held, strict=True) if holds}) == 3
    # at the start nothing has moved yet: the same task has the same goal, another block another
    goals: dict[str, np.ndarray] = {}
    for (block, _), moment in list(zip(tasks, moments, strict=True))[:6]:
        assert np.abs(goals.setdefault(block, moment.goal[0]) - moment.goal[0]).max() < 0.01
    first, *others = goals.values()
    assert others and all(np.abs(first - each).max() > 0.05 for each in others)


def test_labels_are_what_the_expert_then_does():
    env = TabletopEnv("goal", "blue-purple", 32, ())
    env.reset(seed=4)
    for _ in range(10):
        env.advance(env.expert_action())
    labels = expert_chunk(env, 6)
    done = []
    for _ in range(6):
        done.append(env.expert_action().astype(np.float32))
        env.advance(done[-1])
    # the label is computed in double precision, what is done here in single
    assert np.abs(labels - np.array(done)).max() < 1e-4
    assert np.array_equal(labels[0], done[0])


def test_shards_come_back_and_episodes_are_numbered_on(tmp_path):
    parts = [gather(each.episodes(1), each.names, 7, lambda n: None) for each in (recorder(), recorder(1))]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, part in zip(paths, parts, strict=True):
        save_shard(path, part)
    both = load_shards(paths)
    assert len(both) == 14 and both.tasks == parts[0].tasks
    assert np.array_equal(both.images, np.concatenate([part.images for part in parts]))
    assert set(both.episode[:7]).isdisjoint(both.episode[7:])


def test_shards_of_other_tasks_are_refused(tmp_path):
    for name, suites in (("a", {"goal": 1.0}), ("b", {"object": 1.0})):
        source = Recorder(suites, CAMERAS, 16, 4, 0, keep=0.1)
        save_shard(tmp_path / f"{name}.safetensors", gather(source.episodes(1), source.names, 2, lambda n: None))
    with pytest.raises(ValueError, match="b.safetensors holds other tasks"):
        load_shards([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(FileNotFoundError, match="no shards"):
        load_shards([])


@pytest.mark.parametrize("camera", CAMERAS)
def test_places_are_where_the_masks_are(camera):
    env = TabletopEnv("goal", image_size=96, cameras=())
    env.reset(seed=0)
    mask, places = env.object_mask(camera), object_places(env, camera)
    checked = 0
    for name, place in zip(OBJECTS, places, strict=True):
        shown = mask == env.object_names.index("hand" if name == "cup" else name)
        edge = shown[0].any() or shown[-1].any() or shown[:, 0].any() or shown[:, -1].any()
        # what the picture cuts off, or another object hides, may have its middle elsewhere
        if name == "cup" or edge or shown.sum() < 30:
            continue
        rows, columns = np.nonzero(shown)
        inside = (columns.min() <= place[0] * 96 <= columns.max() + 1) and (
            rows.min() <= place[1] * 96 <= rows.max() + 1
        )
        assert inside, (name, place)
        checked += 1
    assert checked >= (6 if camera == "top" else 1), checked


def test_points_behind_a_camera_are_nowhere():
    env = TabletopEnv("goal", image_size=32, cameras=())
    env.reset(seed=0)
    assert np.isnan(project(env, "top", np.array([[0.0, 0.0, 2.0]]))).all()


def test_frames_repeat_and_come_back(tmp_path):
    frames, again = (record_frames(CAMERAS, 24, seed=3, n=6) for _ in range(2))
    assert np.array_equal(frames.images, again.images) and len(frames) == 6
    save_frames(tmp_path / "f.safetensors", frames)
    read = load_frames([tmp_path / "f.safetensors"] * 2)
    assert len(read) == 12 and np.array_equal(read.places[:6], frames.places, equal_nan=True)


def test_shift_is_never_demonstrated():
    from hooked_vla.training.demonstrations import MIXTURE

    assert "shift" not in MIXTURE and set(MIXTURE) < set(TASKS) and sum(MIXTURE.values()) == pytest.approx(1)
