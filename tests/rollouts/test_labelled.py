"""What was true at every plan, joined to what the policy held: keys agree, means are means, frames show it again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_suite import tiny, toy_suite

from hooked_vla.inputs import Segments
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.labelled import (
    FrameRecorder,
    SegmentMeans,
    actions,
    labelled,
    labelled_segments,
    pool,
    read_frames,
    segment_means,
    states,
    step_labels,
)
from hooked_vla.rollouts.settings import Options, constant_text, settle
from hooked_vla.rollouts.sweep import Rollouts, run_rollouts

VLM, EXPERT, VISION = (
    "vlm.blocks.0.hook_resid_post",
    "expert.blocks.0.hook_resid_post",
    "vision.blocks.0.hook_resid_post",
)
OPTIONS = Options(n_envs=2, n_action_steps=4, image_size=16, max_steps=8)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rollouts]:
    """Three episodes, recorded whole and by segments, with frames."""
    folder = tmp_path_factory.mktemp("labelled")
    with ActivationRecorder(folder / "whole") as whole, SegmentMeans(folder / "means") as means:
        watchers = [ActivationWatcher(each, [VLM, EXPERT, VISION], denoise_steps=[0]) for each in (whole, means)]
        watchers += [FrameRecorder(folder / "frames", 4)]
        rollouts = run_rollouts(
            tiny("smolvla"),
            toy_suite(),
            3,
            5,
            ["walk", "short"],
            out=folder / "run",
            options=OPTIONS,
            watchers=watchers,
        )
    return folder, rollouts


def test_labels_are_those_of_the_plans(recorded: tuple[Path, Rollouts]) -> None:
    labels = step_labels(recorded[1])
    every = step_labels(recorded[1], planned=False)
    assert (labels["env_step"] % 4 == 0).all() and len(every) > len(labels)
    assert labels.groupby("episode")["env_step"].apply(list).tolist() == [[0, 4], [0, 4], [0]]
    assert list(labels["task"]) == ["walk"] * 4 + ["short"] and list(labels["seed"]) == [5, 5, 6, 6, 7]
    assert list(labels["block"]) == [None] * 5 and set(labels["phase"]) <= {"far", "near"}
    # the toy's state is place, goal, step, 0
    assert np.allclose(states(labels)[:, 2], labels["env_step"]) and states(labels).shape == (5, 4)
    moved = every[every["episode"] == 0]
    walked = np.clip(actions(moved)[:-1, 0], -1, 1).cumsum()
    assert np.allclose(states(moved)[1:, 0], walked, atol=1e-5)
    won = recorded[1].episodes.to_pandas().set_index("episode")["success"]
    assert all(bool(row.success) == bool(won[row.episode]) for row in labels.itertuples())
    with pytest.raises(KeyError, match="no columns state_0"):
        states(labels[["episode"]])


def test_segment_means_are_means_of_what_was_recorded_whole(recorded: tuple[Path, Rollouts]) -> None:
    folder, rollouts = recorded
    labels = step_labels(rollouts)
    whole, means = (ActivationRecording(folder / name) for name in ("whole", "means"))
    for site, segment, step in ((VLM, "language", None), (VLM, "image:*", None), (EXPERT, "action", 0),
                                (VISION, "image:*", None), (VLM, "state", None)):  # fmt: skip
        first, second = (labelled(each, labels, site, segment, denoise_step=step) for each in (whole, means))
        assert torch.allclose(first.x, second.x, atol=1e-5) and len(first.x) == len(labels)
        pd.testing.assert_frame_equal(first.labels, second.labels)
    key = (1, 4)
    value = whole.get(*key, VLM)
    mask = whole.segments(*key, VLM).mask("language")
    row = labels.index[(labels["episode"] == 1) & (labels["env_step"] == 4)][0]
    assert torch.allclose(labelled(means, labels, VLM, "language").x[row], value[mask].mean(0), atol=1e-5)
    assert torch.equal(labelled(whole, labels, VLM, "language", token=-1).x[row], value[mask][-1])
    assert means.get(*key, VLM).shape[1] < value.shape[1]
    both = labelled_segments(whole, labels, VLM, ["language", None])
    assert torch.equal(both["language"].x, labelled(whole, labels, VLM, "language").x)
    segments = whole.segments(*key, VLM)
    counted = segments.labels != segments.names.index("pad")
    assert torch.allclose(both[None].x[row], value[counted].mean(0), atol=1e-5)


def test_rows_come_in_the_order_of_the_labels(recorded: tuple[Path, Rollouts]) -> None:
    folder, rollouts = recorded
    recording, labels = ActivationRecording(folder / "means"), step_labels(rollouts)
    found = labelled(recording, labels, EXPERT, denoise_step=0)
    backwards = labelled(recording, labels[::-1], EXPERT, denoise_step=0)
    assert torch.equal(found.x, backwards.x.flip(0)) and list(backwards.labels["episode"]) == [2, 1, 1, 0, 0]
    assert set(found.labels["denoise_step"]) == {0}
    some = labelled(recording, labels[labels["episode"] == 1], EXPERT, denoise_step=0)
    assert torch.equal(some.x, found.x[2:4])


def test_kept_frames_show_another_run_what_the_policy_saw(recorded: tuple[Path, Rollouts]) -> None:
    folder, rollouts = recorded
    model, suite = tiny("smolvla"), toy_suite()
    frames = read_frames(folder / "frames")
    assert [(each.episode, each.env_step) for each in frames] == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]
    assert [(each.task, each.seed) for each in frames[::2]] == [("walk", 5), ("walk", 6), ("short", 7)]
    settings = settle(OPTIONS, "smolvla", model, suite)
    with constant_text(model.processor, True), torch.no_grad():
        inputs = prepare(model, settings, [each.frame for each in frames])
        _, cache = model.run_with_cache(inputs, VLM, stop_at=VLM)
    with SegmentMeans(folder / "again") as recorder:
        recorder.add_cache(cache, [each.episode for each in frames], [each.env_step for each in frames])
    labels = step_labels(rollouts)
    first, second = (
        labelled(ActivationRecording(folder / name), labels, VLM, "language").x for name in ("means", "again")
    )
    assert torch.allclose(first, second, atol=1e-5) and first.std(0).max() > 1e-3
    assert [each.episode for each in read_frames(folder / "frames", [1])] == [1, 1]


def test_frames_of_finished_episodes_stay(recorded: tuple[Path, Rollouts]) -> None:
    folder, _ = recorded
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "frames").iterdir()}
    run_rollouts(tiny("smolvla"), toy_suite(), 3, 5, ["walk", "short"], out=folder / "twice", options=OPTIONS,
                 watchers=[FrameRecorder(folder / "frames", 4)])  # fmt: skip
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "frames").iterdir()} == before
    assert list(before) and all(name.endswith(".npz") for name in before)


def test_means_of_rows_with_different_segments() -> None:
    table = Segments(("a", "b", "pad"), torch.tensor([[0, 0, 1], [1, 2, 2]]))
    value = torch.tensor([[[1.0], [3], [5]], [[7], [9], [9]]])
    means, owners = segment_means(value, table)
    assert torch.equal(means, torch.tensor([[[2.0], [5]], [[0], [7]]]))
    assert owners.mask("a").tolist() == [[True, False], [False, False]]
    assert owners.mask("b").tolist() == [[False, True], [False, True]]
    assert pool(value[:1], Segments(table.names, table.labels[:1]), None, None, "x") == 3
    with pytest.raises(ValueError, match="x: this row has no token of a"):
        pool(value[1:], Segments(table.names, table.labels[1:]), "a", None, "x")
    with pytest.raises(ValueError, match="x: token 2 of a, but this row has 2"):
        pool(value[:1], Segments(table.names, table.labels[:1]), "a", 2, "x")


def test_what_was_not_recorded_is_named(recorded: tuple[Path, Rollouts], tmp_path: Path) -> None:
    folder, rollouts = recorded
    recording, labels = ActivationRecording(folder / "means"), step_labels(rollouts)
    with pytest.raises(KeyError, match=f"nothing of {EXPERT} at denoise step 3 for these rows; recorded steps: .0."):
        labelled(recording, labels, EXPERT, denoise_step=3)
    with pytest.raises(KeyError, match="no token segment 'words'"):
        labelled(recording, labels, VLM, "words")
    with pytest.raises(KeyError, match="is not recorded; nearest"):
        labelled(recording, labels, "vlm.blocks.1.hook_resid_post")
    with pytest.raises(FileNotFoundError, match="no frames in"):
        read_frames(tmp_path)
    with pytest.raises(KeyError, match=r"episodes \[9\] have no frames"):
        read_frames(folder / "frames", [9])
    with pytest.raises(ValueError, match="n_action_steps must be at least 1"):
        FrameRecorder(tmp_path, 0)
