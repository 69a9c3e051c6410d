"""Arms of the batteries in rollouts: the model itself gets other tokens, or other pixels, and nothing else changes.

The two defects that these tests are for: a prompt override that is ignored, and image perturbations that are ignored.
"""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookPoint
from hooked_vla.rollouts.arms import BASELINE, Arm, ObservingArm, describe_arms
from hooked_vla.rollouts.batteries.arms import ImageArm, PromptArm
from hooked_vla.rollouts.batteries.images import IMAGE_KINDS
from hooked_vla.rollouts.batteries.prompts import PROMPT_KINDS
from hooked_vla.rollouts.batteries.reach import known_tokens, reaches, reads_text
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.settings import Options, Settings, settle
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import run_rollouts

SUITE = get_suite("goal")
SEED = 700_000
# two chunks of four steps
OPTIONS = Options(n_envs=2, max_steps=8)


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    return HookedVLA.from_pretrained("smolvla-tabletop")


@pytest.fixture(scope="module")
def frame(model: HookedVLA) -> dict:
    return first_frame(("top", "wrist"))


def first_frame(cameras: Sequence[str]) -> dict:
    env = SUITE.make("red-orange", cameras, 96)
    try:
        return env.reset(seed=SEED)[0]
    finally:
        env.close()


def settings(model: HookedVLA) -> Settings:
    return settle(OPTIONS, "model", model, SUITE)


class Inputs(Watcher):
    """Keeps what enters the VLM of every row, by environment step: row 0 is the baseline's, row 1 the arm's."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {"language": [], "image:*": []}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        assert [cell.arm == BASELINE.name for cell in rows] == [True, False]
        return [("vlm.hook_tokens", self.keep)]

    def keep(self, value: Tensor, hook: HookPoint) -> None:
        assert hook.segments is not None
        for segment, kept in self.seen.items():
            positions = hook.segments.mask(segment).any(0)
            kept.append(value[:, positions].clone())


def watch(model: HookedVLA, arm: Arm, out: Path) -> tuple[Inputs, list[np.ndarray]]:
    """What the VLM got of the baseline and of the arm, and the actions of both."""
    watcher = Inputs()
    run_rollouts(model, "goal", 1, SEED, ["red-orange"], [BASELINE, arm], out, OPTIONS, watchers=[watcher])
    steps = read_steps(out).to_pandas()
    return watcher, [np.stack(list(part["action"])) for _, part in steps.groupby("episode")]


def test_a_prompt_arm_tells_the_model_something_else_at_every_plan(model: HookedVLA, tmp_path: Path) -> None:
    arm = PromptArm.of("other_task", SUITE)
    watcher, (plain, told) = watch(model, arm, tmp_path)
    assert len(watcher.seen["language"]) == 2
    for value in watcher.seen["language"]:
        assert not torch.equal(value[0], value[1])
    # nothing else changes: at the first plan, both see the same pictures
    assert torch.equal(*watcher.seen["image:*"][0])
    assert not np.array_equal(plain, told)


def test_an_image_arm_shows_the_model_something_else_at_every_plan(model: HookedVLA, tmp_path: Path) -> None:
    watcher, (plain, shown) = watch(model, ImageArm("hue", "hue"), tmp_path)
    assert len(watcher.seen["image:*"]) == 2
    for pictures, words in zip(watcher.seen["image:*"], watcher.seen["language"], strict=True):
        assert not torch.equal(pictures[0], pictures[1])
        assert torch.equal(words[0], words[1])
    assert not np.array_equal(plain, shown)


@pytest.mark.parametrize("arm", [PromptArm.of("shuffled", SUITE), ImageArm("noise x2", "noise", 2.0, ("top",))])
def test_arms_are_seeded_leave_the_frame_alone_and_travel(arm: ObservingArm, frame: dict) -> None:
    cell = Cell(3, arm.name, "red-orange", SEED)
    before = {camera: image.copy() for camera, image in frame["pixels"].items()}
    seen = arm.observe(cell, 4, frame)
    assert isinstance(arm, ObservingArm) and arm.hooks([cell]) == ()
    assert all(np.array_equal(frame["pixels"][camera], image) for camera, image in before.items())
    assert frame["instruction"] == "put the red block on the orange pad"
    travelled = pickle.loads(pickle.dumps(arm))
    assert travelled == arm
    again = travelled.observe(replace(cell, id=9), 4, frame)
    assert again["instruction"] == seen["instruction"]
    assert all(np.array_equal(again["pixels"][camera], seen["pixels"][camera]) for camera in before)
    other = arm.observe(replace(cell, seed=SEED + 1), 4, frame)
    assert other["instruction"] != seen["instruction"] or not np.array_equal(
        other["pixels"]["top"], seen["pixels"]["top"]
    )


def test_an_image_arm_changes_the_cameras_that_it_names_with_noise_of_each_step_and_camera(frame: dict) -> None:
    cell = Cell(0, "a", "red-orange", SEED)
    seen = ImageArm("a", "noise", cameras=("top",)).observe(cell, 0, frame)
    assert np.array_equal(seen["pixels"]["wrist"], frame["pixels"]["wrist"])
    assert not np.array_equal(seen["pixels"]["top"], frame["pixels"]["top"])
    later = ImageArm("a", "noise", cameras=("top",)).observe(cell, 4, frame)
    assert not np.array_equal(seen["pixels"]["top"], later["pixels"]["top"])
    same = {**frame, "pixels": {name: np.full((8, 8, 3), 128, np.uint8) for name in ("top", "wrist")}}
    both = ImageArm("a", "noise").observe(cell, 0, same)["pixels"]
    assert not np.array_equal(both["top"], both["wrist"])
    with pytest.raises(ValueError, match=r"arm 'a': no cameras \['agent'\] in what the policy is shown: \['top', 'wri"):
        ImageArm("a", "noise", cameras=("agent",)).observe(cell, 0, frame)


def test_arms_of_all_kinds_describe_themselves_differently() -> None:
    arms = [PromptArm.of(kind, SUITE) for kind in PROMPT_KINDS] + [ImageArm(kind, kind) for kind in IMAGE_KINDS]
    arms += [ImageArm("noise x2", "noise", 2.0), ImageArm("noise top", "noise", cameras=("top",))]
    said = describe_arms(arms)
    assert len({str(each) for each in said.values()}) == len(arms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptArm("p", "rude", ()), "arm 'p': unknown kind 'rude'"),
        (lambda: ImageArm("i", "melt"), "arm 'i': unknown kind 'melt'"),
        (lambda: ImageArm("i", "blank", 2.0), "blank knows no degrees"),
        (lambda: ImageArm("i", "noise", cameras=()), "arm 'i': no cameras"),
    ],
)
def test_arms_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_reaches_the_model_is_counted_behind_its_preprocessing(model: HookedVLA, frame: dict) -> None:
    now, told = settings(model), frame["instruction"]

    def prompt(text: str):
        return reaches(model, now, frame, {**frame, "instruction": text})

    assert not prompt(told).changed and not prompt(told.upper()).changed
    # red -> blue: one token; one word more: all that follow it move
    assert (prompt(told.replace("red", "blue")).tokens, prompt(f"{told} now").tokens) == (1, 2)
    # words that the tokenizer does not know are all one token
    assert prompt("dax the wug").text == prompt("zup the fep").text
    assert prompt("").tokens == len(prompt(told).text) - len(prompt("").text) + 1
    image = reaches(model, now, frame, ImageArm("b", "blank").observe(Cell(0, "b", "t", 0), 0, frame))
    assert image.tokens == 0 and image.pixels > 0.9 and 0.1 < image.pixel_change < 1
    half = reaches(model, now, frame, ImageArm("b", "blank", cameras=("top",)).observe(Cell(0, "b", "t", 0), 0, frame))
    assert half.pixels == pytest.approx(0.5, abs=0.05)
    assert known_tokens(model, "put the dax block") == (3, 4) and known_tokens(model, "") == (0, 0)
    with pytest.raises(ValueError, match="instruction of 21 tokens, but the model takes 16"):
        prompt("put " * 20)


def test_an_arm_that_changes_nothing_ends_the_rollouts_by_default(model: HookedVLA, tmp_path: Path) -> None:
    """Capitals are lower case to the tokenizer: such an episode is the baseline's, not one of "no effect"."""
    arm = PromptArm.of("upper_case", SUITE)
    message = r"arm 'upper_case' changes nothing that reaches the model in episode .*red-orange.* inert='run'"
    with pytest.raises(ValueError, match=message):
        run_rollouts(model, "goal", 1, SEED, ["red-orange"], [BASELINE, arm], tmp_path / "a", OPTIONS)
    allowed = replace(arm, inert="run")
    done = run_rollouts(model, "goal", 1, SEED, ["red-orange"], [BASELINE, allowed], tmp_path / "b", OPTIONS)
    assert done.episodes["arm"].to_pylist() == ["baseline", "upper_case"]
    # what was allowed is on record
    assert allowed.describe()["inert"] == "run" and arm.describe()["inert"] == "error"
    # a strength at which a kind changes nothing
    with pytest.raises(ValueError, match="arm 'none' changes nothing that reaches the model"):
        none = ImageArm("none", "noise", 0.0)
        run_rollouts(model, "goal", 1, SEED, ["red-orange"], [none], tmp_path / "c", OPTIONS)


def test_an_arm_whose_change_is_lost_on_the_way_ends_the_rollouts(model: HookedVLA, tmp_path: Path) -> None:
    """The published defects: a prompt override, and image perturbations, that are ignored."""

    class Ignored(PromptArm):
        def prompt(self, cell: Cell, instruction: str) -> str:
            return instruction

    arm = Ignored("other_task", "other_task", tuple(task.instruction for task in SUITE.tasks))
    with pytest.raises(ValueError, match="arm 'other_task' changes nothing that reaches the model"):
        run_rollouts(model, "goal", 1, SEED, ["red-orange"], [arm], tmp_path, OPTIONS)


def test_the_first_plan_of_every_episode_is_checked(model: HookedVLA, tmp_path: Path) -> None:
    checked: list[tuple[str, int]] = []

    class Counted(PromptArm):
        def check(self, model, settings, cell, before, after) -> None:
            super().check(model, settings, cell, before, after)
            checked.append((cell.task, cell.seed))

    arm = Counted("null", "null", ())
    # three episodes in batches of two rows: the row that no episode has is not one of them
    done = run_rollouts(model, "goal", 3, SEED, ["red-orange"], [arm], tmp_path, OPTIONS)
    assert sorted(checked) == sorted(zip(*(done.episodes[name].to_pylist() for name in ("task", "seed")), strict=True))


FAMILIES = ("smolvla-tabletop", "pi05-tabletop", "xvla-tabletop", "groot-tabletop", "act-tabletop")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[str, HookedVLA, Settings, dict]:
    """A trained policy, how its rollouts would be, and what it sees first."""
    loaded = HookedVLA.from_pretrained(request.param)
    now = settings(loaded)
    return request.param, loaded, now, first_frame(tuple(now.cameras.values()))


# to these policies' tokenizers, capitals are lower case
INERT = {"upper_case"}


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_every_kind_of_prompt_reaches_every_family_that_reads(family: Any, kind: str) -> None:
    name, other, now, frame = family
    arm = PromptArm.of(kind, SUITE)
    cell = Cell(0, kind, "red-orange", SEED)
    found = reaches(other, now, frame, arm.observe(cell, 0, frame))
    # a policy without language reads none of it
    assert (found.tokens > 0) == (name != "act-tabletop" and kind not in INERT)
    assert found.pixels == 0


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_kind_of_image_reaches_every_family(family: Any, kind: str) -> None:
    _, other, now, frame = family
    found = reaches(other, now, frame, ImageArm(kind, kind).observe(Cell(0, kind, "red-orange", SEED), 0, frame))
    assert found.pixels > 0.003 and found.pixel_change > 0 and found.tokens == 0


def test_texts_and_words_of_other_families(family: Any) -> None:
    name, other, now, frame = family
    told = {**frame, "instruction": "put the blue block on the orange pad"}
    reads = name != "act-tabletop"
    assert reads_text(other, now, frame) == reads and reaches(other, now, frame, told).tokens == reads
    if reads:
        assert known_tokens(other, "put the dax") == (2, 3)
        return
    with pytest.raises(TypeError, match="reads no text"):
        known_tokens(other, "put")
