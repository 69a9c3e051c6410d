"""Activations on disk: what comes out is what a hook saw, an interrupted recording goes on, damage is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vla import HookedVLA, Observation, Segments
from hooked_vla.rollouts import activation_store
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE, FunctionArm
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts

RESID, VELOCITY, VISION = "vlm.blocks.1.hook_resid_post", "expert.hook_velocity", "vision.blocks.0.hook_resid_post"
PREFIX_K, PATTERN = "expert.blocks.1.cross_attn.hook_prefix_k", "vlm.blocks.0.attn.hook_pattern"
SITES = [RESID, VELOCITY, VISION, PATTERN]
AXES = ("batch", "seq", "d_model")


def value(number: float, tokens: int = 3) -> torch.Tensor:
    return torch.full((1, tokens, 2), float(number))


def store(folder: Path, episodes: range = range(2), **settings: Any) -> Path:
    """Two steps of each episode, whose values say which they are."""
    with ActivationRecorder(folder, **settings) as recorder:
        for episode in episodes:
            for step in (0, 8):
                recorder.put(episode, step, None, RESID, AXES, value(100 * episode + step))
                for denoise in range(3):
                    recorder.put(episode, step, denoise, VELOCITY, AXES, value(1000 * denoise + 100 * episode + step))
            recorder.finish(episode)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shards/*/*.safetensors"))


def test_every_value_comes_back_under_its_key(tmp_path):
    recording = ActivationRecording(store(tmp_path / "a"))
    assert recording.episodes == [0, 1] and recording.sites == {RESID: AXES, VELOCITY: AXES}
    for episode in range(2):
        for step in (0, 8):
            assert torch.equal(recording.get(episode, step, RESID), value(100 * episode + step))
            for denoise in range(3):
                expected = value(1000 * denoise + 100 * episode + step)
                assert torch.equal(recording.get(episode, step, VELOCITY, denoise), expected)


def test_a_site_is_stacked_with_its_keys(tmp_path):
    recording = ActivationRecording(store(tmp_path / "a"))
    whole = recording.stack(RESID)
    assert whole.keys == ((0, 0, None), (0, 8, None), (1, 0, None), (1, 8, None))
    assert torch.equal(whole.values[:, 0, 0], torch.tensor([0.0, 8, 100, 108]))
    some = recording.stack(VELOCITY, episodes=[1], denoise_steps=[0, 2], env_steps=[8])
    assert some.keys == ((1, 8, 0), (1, 8, 2)) and some.values[:, 0, 0].tolist() == [108, 2108]
    chosen = recording.fetch(RESID, [(1, 8, None), (0, 0, None)])
    assert chosen[:, 0, 0].tolist() == [108, 0] and chosen.shape == (2, 3, 2)
    assert recording.index.num_rows == 16 and recording.index["episode"].unique().to_pylist() == [0, 1]


def test_shards_stay_small_and_change_nothing(tmp_path):
    one = store(tmp_path / "one")
    many = store(tmp_path / "many", shard_bytes=50)
    assert len(shards(one)) == 2 and len(shards(many)) == 6
    assert max(each.stat().st_size for each in shards(many)) < 1500
    first, second = ActivationRecording(one), ActivationRecording(many)
    for site in (RESID, VELOCITY):
        assert first.keys(site) == second.keys(site)
        assert torch.equal(first.stack(site).values, second.stack(site).values)


def test_a_value_that_comes_again_is_kept_once(tmp_path):
    with ActivationRecorder(tmp_path / "a") as recorder:
        for step in range(10):
            recorder.put(0, 0, step, VELOCITY, AXES, torch.ones(1, 100, 100))
        recorder.put(0, 0, 10, VELOCITY, AXES, torch.zeros(1, 100, 100))
    assert 80_000 < shards(tmp_path / "a")[0].stat().st_size < 90_000
    stacked = ActivationRecording(tmp_path / "a").stack(VELOCITY).values
    assert torch.equal(stacked[:10], torch.ones(10, 100, 100)) and not stacked[10].any()


def test_kept_values_are_copies_and_may_be_smaller(tmp_path):
    whole = torch.randn(4, 3, 2)
    with ActivationRecorder(tmp_path / "a", dtype=torch.bfloat16) as recorder:
        recorder.put(0, 0, None, RESID, AXES, whole[1:2])
        recorder.put(0, 0, None, "head.hook_code", ("batch", "option"), torch.tensor([[3, 4]]))
        expected = whole[1:2].to(torch.bfloat16)
        whole.zero_()
    recording = ActivationRecording(tmp_path / "a")
    assert torch.equal(recording.get(0, 0, RESID), expected)
    assert recording.get(0, 0, "head.hook_code").dtype == torch.int64


def test_values_that_all_rows_share_stay_whole(tmp_path):
    shared = torch.randn(5, 2)
    with ActivationRecorder(tmp_path / "a") as recorder:
        for episode in range(2):
            recorder.put(episode, 0, None, "vision.hook_pos_embed", ("seq", "d_model"), shared + episode)
    recording = ActivationRecording(tmp_path / "a")
    assert torch.equal(recording.get(1, 0, "vision.hook_pos_embed"), shared + 1)
    assert recording.stack("vision.hook_pos_embed").values.shape == (2, 5, 2)


# Interruption.


def test_recording_goes_on_in_a_folder(tmp_path):
    folder = store(store(tmp_path / "a"), range(2, 4))
    recording = ActivationRecording(folder)
    assert recording.episodes == [0, 1, 2, 3]
    assert torch.equal(recording.get(1, 8, RESID), value(108)) and torch.equal(recording.get(3, 8, RESID), value(308))


def test_what_a_killed_process_left_is_not_shown_and_is_recorded_again(tmp_path):
    folder = store(tmp_path / "a", range(1))
    recorder = ActivationRecorder(folder, shard_bytes=1)
    recorder.put(1, 0, None, RESID, AXES, value(1))
    recorder.put(1, 3, None, RESID, AXES, value(2))
    recorder._lock.close()
    (folder / "shards/000/.000000009.safetensors.7.tmp").write_bytes(b"half")
    (folder / "index/000/.000000009.parquet.tmp").write_bytes(b"half")
    assert ActivationRecording(folder).episodes == [0]
    n_left = len(shards(folder))

    with ActivationRecorder(folder, shard_bytes=1) as again:
        assert len(shards(folder)) < n_left and not [*folder.rglob("*.tmp")]
        again.put(1, 0, None, RESID, AXES, value(5))
        again.finish(1)
    recording = ActivationRecording(folder)
    assert recording.keys(RESID) == [(0, 0, None), (0, 8, None), (1, 0, None)]
    assert torch.equal(recording.get(1, 0, RESID), value(5))


def test_a_shard_with_a_finished_and_a_dropped_episode(tmp_path):
    recorder = ActivationRecorder(tmp_path / "a")
    recorder.put(0, 0, None, RESID, AXES, value(1))
    recorder.put(1, 0, None, RESID, AXES, value(2))
    recorder.finish(0)
    recorder.discard()
    assert ActivationRecording(tmp_path / "a").keys(RESID) == [(0, 0, None)]
    with ActivationRecorder(tmp_path / "a") as again:
        again.put(1, 0, None, RESID, AXES, value(3))
    assert ActivationRecording(tmp_path / "a").stack(RESID).values[:, 0, 0].tolist() == [1, 3]


def test_an_exception_drops_only_what_was_under_way(tmp_path):
    with pytest.raises(ArithmeticError), ActivationRecorder(tmp_path / "a") as recorder:
        recorder.put(0, 0, None, RESID, AXES, value(1))
        recorder.finish(0)
        recorder.put(1, 0, None, RESID, AXES, value(2))
        raise ArithmeticError
    assert ActivationRecording(tmp_path / "a").episodes == [0]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    recorder = ActivationRecorder(tmp_path / "a")
    recorder.put(0, 0, None, RESID, AXES, value(1))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(activation_store, "write_file", full)
        with pytest.raises(OSError, match="No space left"):
            recorder.finish(0)
    assert not shards(tmp_path / "a") and not [*(tmp_path / "a").rglob("*.tmp")]
    recorder.close()
    assert torch.equal(ActivationRecording(tmp_path / "a").get(0, 0, RESID), value(1))


def test_one_process_records_in_a_folder(tmp_path):
    with ActivationRecorder(tmp_path / "a"):
        with pytest.raises(BlockingIOError, match="another process is recording"):
            ActivationRecorder(tmp_path / "a")
        assert ActivationRecording(tmp_path / "a").episodes == []


def test_wrong_use_is_refused(tmp_path):
    folder = store(tmp_path / "a", about={"model": "one"})
    with pytest.raises(ValueError, match="another recording: it says {'model': 'one'}, not {'model': 'two'}"):
        ActivationRecorder(folder, about={"model": "two"})
    with ActivationRecorder(folder, about={"model": "one"}) as recorder:
        for attempt in (lambda: recorder.put(0, 9, None, RESID, AXES, value(1)), lambda: recorder.finish(1)):
            with pytest.raises(ValueError, match="is recorded and finished"):
                attempt()
        with pytest.raises(ValueError, match="0 or more"):
            recorder.put(7, -1, None, RESID, AXES, value(1))
    assert ActivationRecording(folder).about == {"model": "one"}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "other.txt").touch()
    with pytest.raises(ValueError, match=r"no recording.json, but holds \['other.txt'\]"):
        ActivationRecorder(tmp_path / "b")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1"):
        ActivationRecorder(tmp_path / "c", shard_bytes=0)


# Damage.


def test_unknown_keys_name_what_there_is(tmp_path):
    recording = ActivationRecording(store(tmp_path / "a"))
    for arguments, message in (
        ((0, 0, "vlm.blocks.1.hook_resid_pots"), "is not recorded; nearest.*vlm.blocks.1.hook_resid_post"),
        ((7, 0, RESID), r"episode 7 is not recorded at .*; recorded: \[0, 1\]"),
        ((0, 4, RESID), r"not recorded at env_step 4 of episode 0; recorded: \[0, 8\]"),
        ((0, 0, VELOCITY, 3), r"not recorded at denoise step 3 there; recorded: \[0, 1, 2\]"),
        ((0, 0, VELOCITY), "belongs to a denoise step: say which"),
        ((0, 0, RESID, 0), "runs once a chunk"),
    ):
        with pytest.raises(KeyError, match=message):
            recording.get(*arguments)
    with pytest.raises(KeyError, match=r"nothing of .* in episodes \[9\]"):
        recording.stack(RESID, episodes=[9])


def test_values_of_other_shapes_are_not_stacked(tmp_path):
    with ActivationRecorder(tmp_path / "a") as recorder:
        recorder.put(0, 0, None, RESID, AXES, value(1, tokens=3))
        recorder.put(1, 0, None, RESID, AXES, value(1, tokens=4))
    recording = ActivationRecording(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"\[1, 3, 2\] torch.float32 at \(0, 0, None\), but \[1, 4, 2\].*\(1, 0, None\)"
    ):
        recording.stack(RESID)
    assert recording.stack(RESID, episodes=[1]).values.shape == (1, 4, 2)


def test_damaged_files_are_named(tmp_path):
    folder = store(tmp_path / "a")
    first, second = shards(folder)
    whole = first.read_bytes()

    first.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"{first} is truncated.*{len(whole) - 8} bytes, its index says {len(whole)}"):
        ActivationRecording(folder).get(0, 0, RESID)
    assert torch.equal(ActivationRecording(folder).get(1, 0, RESID), value(100))
    first.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=f"{first} is damaged"):
        ActivationRecording(folder).get(0, 0, RESID)
    first.write_bytes(whole.replace(b'"shape":[2, 3, 2]', b'"shape":[3, 2, 2]').replace(b"[2, 3, 2]", b"[3, 2, 2]"))
    with pytest.raises(ValueError, match=r"shape \[3, 2, 2\], but its index says \[2, 3, 2\]"):
        ActivationRecording(folder).get(0, 0, RESID)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first} is missing"):
        ActivationRecording(folder).get(0, 0, RESID)

    index = next(folder.glob("index/*/*.parquet"))
    index.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        ActivationRecording(folder)
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        ActivationRecorder(folder)
    (folder / "recording.json").write_text("{")
    with pytest.raises(ValueError, match="recording.json is damaged"):
        ActivationRecording(folder)
    (folder / "recording.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not of the format"):
        ActivationRecording(folder)
    with pytest.raises(FileNotFoundError, match=r"no recording.json in .*nowhere"):
        ActivationRecording(tmp_path / "nowhere")


# With a model.


def look(rows: int) -> Observation:
    draw = np.random.default_rng(0)
    images = {camera: draw.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8) for camera in ("agent", "wrist")}
    return Observation(images, draw.normal(size=(rows, 4)).astype(np.float32), ["lift", "put it down"][:rows])


def test_a_cache_is_recorded_row_by_row(tiny_model: HookedVLA, tmp_path):
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(look(2), SITES)
    with ActivationRecorder(tmp_path / "a") as recorder:
        recorder.add_cache(cache, episodes=[4, 2], env_steps=[16, 8])
        with pytest.raises(ValueError, match="1 episodes and 2 env_steps for a cache of 2 rows"):
            recorder.add_cache(cache, [1], [0, 0])
    recording = ActivationRecording(tmp_path / "a")
    assert torch.equal(recording.get(4, 16, RESID), cache[RESID][:1])
    assert torch.equal(recording.get(2, 8, VELOCITY, 3), cache[VELOCITY][3, 1:])
    # two cameras, so two images a row
    assert torch.equal(recording.get(4, 16, VISION), cache[VISION][:2])
    assert torch.equal(recording.fetch(VISION, [(4, 16, None), (2, 8, None)]), cache[VISION])
    for axis in ("query", "key"):
        segments = recording.segments(2, 8, PATTERN, axis=axis)
        assert torch.equal(segments.labels, cache.segments["vlm"].labels[1:])
        assert segments.names == cache.segments["vlm"].names
    assert recording.segments(4, 16, VISION).row_axis == "image"
    with pytest.raises(ValueError, match=r"token axes \['query', 'key'\]: axis must be one of them, got None"):
        recording.segments(2, 8, PATTERN)
    language = recording.segments(2, 8, RESID).mask("language")
    assert torch.equal(recording.get(2, 8, RESID)[language], cache.rows(1)[RESID].segment("language")[0])


def test_a_recorded_value_can_be_put_back(tiny_model: HookedVLA, tmp_path):
    """What an injection does: another episode's value at one site, and nothing else of it, gives its actions."""
    site = "expert.blocks.3.hook_resid_post"
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actions, cache = tiny_model.run_with_cache(look(2), site, noise=noise)
        assert actions is not None
        with ActivationRecorder(tmp_path / "a") as recorder:
            recorder.add_cache(cache, [0, 1], [0, 0])
        recording = ActivationRecording(tmp_path / "a")

        def inject(value: torch.Tensor, hook: Any) -> torch.Tensor:
            return recording.fetch(site, [(1, 0, hook.denoise_step), (0, 0, hook.denoise_step)])

        swapped = tiny_model.run_with_hooks(look(2), [(site, inject)], noise=noise.flip(0))
    assert torch.allclose(swapped.chunk, actions.chunk.flip(0), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", "tiny", seed=0)


def run(model: HookedVLA, folder: Path, out: Path | None = None, **settings: Any) -> None:
    with ActivationRecorder(folder) as recorder:
        kind = settings.pop("watcher", ActivationWatcher)
        watcher = kind(recorder, settings.pop("sites", SITES), **settings)
        arms = [BASELINE, FunctionArm("doubled", ((RESID, lambda v, hook: 2 * v),), "doubles the residual stream")]
        options = Options(n_envs=3, max_steps=9, n_action_steps=8, image_size=32)
        run_rollouts(model, "goal", 2, 0, arms=arms, options=options, watchers=[watcher], out=out)


def test_episodes_are_recorded_while_they_run(model, tmp_path):
    run(model, tmp_path / "a", tmp_path / "run")
    recording = ActivationRecording(tmp_path / "a")
    # two scenes under two arms
    assert recording.episodes == [0, 1, 2, 3] and set(recording.sites) == set(SITES)
    assert recording.keys(RESID) == [(episode, step, None) for episode in range(4) for step in (0, 8)]
    assert len(recording.keys(VELOCITY)) == 4 * 2 * model.n_denoise_steps
    # both arms start from the same observation; the recording sees what the edit made of it
    assert torch.allclose(2 * recording.get(0, 0, RESID), recording.get(2, 0, RESID))
    assert recording.get(0, 0, VISION).shape[0] == 2
    assert "language" in recording.segments(3, 8, RESID).present()
    assert isinstance(recording.segments(3, 8, RESID), Segments)

    # the same run again finds everything recorded, and an unfinished one goes on
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    run(model, tmp_path / "a")
    assert before == {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    run(model, tmp_path / "b", sites=[VELOCITY], denoise_steps=[0, 2], env_steps=[8])
    limited = ActivationRecording(tmp_path / "b")
    assert limited.keys(VELOCITY) == [(episode, 8, step) for episode in range(4) for step in (0, 2)]
    # the recorded patterns made the first run compute attention in another order
    assert torch.allclose(limited.stack(VELOCITY).values, recording.fetch(VELOCITY, limited.keys(VELOCITY)), atol=1e-5)


class Interruption(ActivationWatcher):
    """Stops the run when an episode is over, before it counts as run."""

    def end(self, part: Any, last: Any) -> None:
        super().end(part, last)
        if part.cell.id == 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "a", tmp_path / "run", watcher=Interruption, sites=[RESID])
    assert 0 < len(ActivationRecording(tmp_path / "a").episodes) < 4
    run(model, tmp_path / "a", tmp_path / "run", sites=[RESID])
    run(model, tmp_path / "b", sites=[RESID])
    gone_on, whole = ActivationRecording(tmp_path / "a"), ActivationRecording(tmp_path / "b")
    assert gone_on.keys(RESID) == whole.keys(RESID)
    assert torch.equal(gone_on.stack(RESID).values, whole.stack(RESID).values)


def test_prefix_keys_that_every_step_reads_are_kept_once(model, tmp_path):
    run(model, tmp_path / "a", sites=[PREFIX_K], env_steps=[0])
    recording = ActivationRecording(tmp_path / "a")
    assert len(recording.keys(PREFIX_K)) == 4 * model.n_denoise_steps
    rows = recording.index.group_by(["episode", "tensor", "row"]).aggregate([]).num_rows
    assert rows == 4


def test_watching_outside_a_rollout_is_refused(tiny_model, tmp_path):
    with ActivationRecorder(tmp_path / "a") as recorder:
        watcher = ActivationWatcher(recorder, RESID)
        hooks = watcher.hooks([Cell(0, "baseline", "red-orange", 0)])
        with pytest.raises(RuntimeError, match="outside a rollout"), tiny_model.hooks(hooks):
            tiny_model.predict_action_chunk(look(1))
