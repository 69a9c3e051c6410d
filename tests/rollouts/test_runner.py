"""A group of episodes: clocks, endings, what is drawn and seen, and the actions of the policy's own entry point."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_suite import CAMERAS, ToyEnv, tiny, toy_suite

from hooked_vla import HookedVLA, list_models
from hooked_vla.inputs import Observation
from hooked_vla.rollouts.acting import ExpertActor, ModelActor, prepare, try_out
from hooked_vla.rollouts.arms import BASELINE, FunctionArm
from hooked_vla.rollouts.cells import Cell, Group
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.records import EPISODES, STEPS
from hooked_vla.rollouts.runner import Environments, GroupRunner, Watcher
from hooked_vla.rollouts.settings import Options, settle

with_parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the sim extra")


def make_runner(model: HookedVLA | None, arms=(BASELINE,), suite=None, watchers=(), **options) -> GroupRunner:
    suite = suite or toy_suite()
    settings = settle(Options(**options), "toy model", model, suite)
    cameras = tuple(settings.cameras.values())
    if model is None:
        actor = ExpertActor(suite)
    else:
        frame, _ = ToyEnv("walk", cameras, settings.image_size).reset(seed=0)
        actor = ModelActor(
            "toy model", model, suite, arms, settings, try_out("toy model", model, suite, settings, frame)
        )
    environments = Environments(suite, cameras, settings.image_size, limit=16)
    return GroupRunner(actor, suite, "toy model", settings.n_envs, settings.max_steps, environments, watchers)


def make_group(*tasks: str, arm: str = "baseline", first_seed: int = 0) -> Group:
    return Group(0, tuple(Cell(i, arm, task, first_seed + i) for i, task in enumerate(tasks)))


def read(content: bytes) -> list[dict]:
    import pyarrow as pa

    return with_parquet.read_table(pa.BufferReader(content)).to_pylist()


def test_episodes_end_as_they_should_and_are_handed_over_at_once() -> None:
    parts = list(make_runner(None).run(make_group("walk", "walk", "cliff", "short", "walk", first_seed=2)))
    rows = {row["episode"]: row for part in parts for row in read(part.episode)}
    # seeds 2.. give goals 5, 6, 3, 4, 5 steps away; "cliff" ends at its goal, "short" before
    assert [part.cell.id for part in parts] == [3, 2, 0, 4, 1]
    endings = {i: (row["ending"], row["n_steps"], row["success"]) for i, row in rows.items()}
    assert endings == {
        0: ("success", 5, True), 1: ("success", 6, True), 2: ("success", 3, True), 3: ("truncated", 2, False),
        4: ("success", 5, True),
    }  # fmt: skip
    [fallen] = make_runner(None).run(make_group("cliff", first_seed=3))
    assert read(fallen.episode)[0]["ending"] == "terminated" and not fallen.success
    [late] = make_runner(None, max_steps=4).run(make_group("walk", first_seed=3))
    assert read(late.episode)[0] | {"ending": "time limit", "n_steps": 4, "success": False} == read(late.episode)[0]


def test_tables_hold_what_was_seen_done_and_got() -> None:
    [part] = make_runner(None).run(make_group("walk", first_seed=1))
    steps, [episode] = read(part.steps), read(part.episode)
    assert list(steps[0]) == STEPS.names and list(episode) == EPISODES.names
    assert [step["env_step"] for step in steps] == [0, 1, 2, 3] and part.n_steps == 4
    assert [step["state"][0] for step in steps] == [0, 1, 2, 3] and episode["final_state"] == [4, 4, 4, 0]
    assert [step["phase"] for step in steps] == ["far", "near", "near", "near"]
    assert dict(steps[2]["poses"]) == {"points/self": [2.0], "goal": [4.0, 0.0]}
    assert dict(episode["final_poses"])["points/self"] == [4.0]
    assert [step["reward"] for step in steps] == [0, 0, 0, 1] and episode["total_reward"] == 1
    assert [step["success"] for step in steps] == [False, False, False, True]
    assert all(step["action"] == [1, 0, 0, 0] for step in steps)
    about = {name: episode[name] for name in ("model", "suite", "arm", "task", "instruction", "seed", "n_chunks")}
    assert about == {"model": "toy model", "suite": "toy", "arm": "baseline", "task": "walk", "instruction": "go walk",
                     "seed": 1, "n_chunks": 4}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in list_models() if name != "xvla"])
def test_a_group_of_one_acts_as_select_action_does(name: str) -> None:
    """Also for policies that see several observations, from those of the last steps."""
    model = tiny(name)
    runner = make_runner(model, n_envs=1, max_steps=5, image_size=72, constant_text=False)
    [part] = runner.run(make_group("walk", first_seed=7))
    env = ToyEnv("walk", CAMERAS, 72)
    obs, _ = env.reset(seed=7)
    noise, chunk = None, model.spec.features.n_action_steps
    model.reset()
    for step, recorded in enumerate(read(part.steps)):
        seen = Observation(
            {c: obs["pixels"][c][None] for c in model.spec.features.cameras}, obs["state"][None], "go walk"
        )
        noise = noise or SeededNoise.of(model, seen)
        action = model.select_action(seen, noise([7], step // chunk * chunk))[0].numpy()
        assert np.array_equal(np.array(recorded["action"], np.float32), action), step
        assert (recorded["chunk"], recorded["chunk_step"]) == divmod(step, chunk)
        obs, *_ = env.step(action)
    model.reset()


def test_the_clocks_are_visible_to_edits(tiny_model: HookedVLA) -> None:
    seen = []

    def look(value, hook):
        seen.append((hook.run.env_step, hook.denoise_step))

    arm = FunctionArm("look", (("expert.hook_velocity", look),), "changes nothing")
    runner = make_runner(tiny_model, (arm,), n_envs=2, max_steps=12, n_action_steps=5)
    list(runner.run(make_group("walk", "walk", arm="look")))
    steps = range(tiny_model.n_denoise_steps)
    assert seen == [(env_step, step) for env_step in (0, 5, 10) for step in steps]
    assert tiny_model.run_state.env_step is None


def test_a_run_left_half_way_may_end_while_another_acts(tiny_model: HookedVLA) -> None:
    left = iter(make_runner(tiny_model, n_envs=2, max_steps=12).run(make_group("short", "walk")))
    tokenizer, seen = tiny_model.processor.tokenizer, []
    features = tokenizer.features
    next(left)

    def look(value, hook):
        # as when the garbage collector comes by
        left.close()
        seen.append((hook.run.env_step, tokenizer.features.pad_text))

    arm = FunctionArm("look", (("expert.hook_velocity", look),), "changes nothing")
    runner = make_runner(tiny_model, (arm,), n_envs=2, max_steps=12, n_action_steps=5)
    list(runner.run(make_group("walk", "walk", arm="look")))
    assert set(seen) == {(0, "max_length"), (5, "max_length"), (10, "max_length")}
    assert (tiny_model.run_state.env_step, tiny_model.run_state.in_use) == (None, None)
    assert tokenizer.features is features


def test_only_what_the_policy_sees_is_drawn(tiny_model: HookedVLA) -> None:
    made: list[ToyEnv] = []

    def make(task, cameras, image_size):
        made.append(ToyEnv(task, cameras, image_size))
        return made[-1]

    group = make_group("walk", first_seed=7)
    list(make_runner(tiny_model, suite=toy_suite(make=make), n_envs=1, n_action_steps=5).run(group))
    assert made[0].drawn == [0, 5, 10] and made[0].cameras == CAMERAS
    history = tiny("diffusion")
    runner = make_runner(history, suite=toy_suite(make=make), n_envs=1, n_action_steps=4, image_size=72)
    list(runner.run(group))
    assert made[1].drawn == [0, 3, 4, 7, 8, 11, 12]


class Everything(Watcher):
    draws_every_step = True

    def __init__(self) -> None:
        self.steps, self.ends, self.rows, self.values = [], [], [], []

    def hooks(self, rows):
        self.rows.append(tuple(rows))
        return [("vlm.blocks.0.hook_resid_pre", lambda value, hook: self.values.append(value.clone()))]

    def step(self, cell, env_step, before, action, reward, info):
        assert set(before["pixels"]) == set(CAMERAS)
        self.steps.append((cell.id, env_step))

    def end(self, part, last):
        assert set(last["pixels"]) == set(CAMERAS)
        self.ends.append(part.cell.id)


def test_watchers_see_everything_and_change_nothing(tiny_model: HookedVLA) -> None:
    arm = FunctionArm("plus", (("vlm.blocks.0.hook_resid_pre", lambda value, hook: value + 1),), "adds 1")
    group = make_group("walk", "short", arm="plus")
    plain = list(make_runner(tiny_model, (arm,), n_envs=3, max_steps=4).run(group))
    watcher = Everything()
    watched = list(make_runner(tiny_model, (arm,), n_envs=3, max_steps=4, watchers=(watcher,)).run(group))
    assert watched == plain
    assert sorted(watcher.ends) == [0, 1] and watcher.steps.count((1, 1)) == 1 and (1, 2) not in watcher.steps
    assert watcher.rows == [(*group.cells, group.cells[0])]
    # after the edit: the value that the model goes on with
    runner = make_runner(tiny_model, n_envs=3, max_steps=4)
    with tiny_model.hooks([("vlm.blocks.0.hook_resid_pre", lambda value, hook: watcher.values.append(value.clone()))]):
        list(runner.run(make_group("walk", "short")))
    torch.testing.assert_close(watcher.values[0], watcher.values[len(watcher.values) // 2] + 1)


def test_an_episode_is_the_same_whatever_shares_its_batch(tiny_model: HookedVLA) -> None:
    def steps(*tasks: str) -> list[bytes]:
        parts = make_runner(tiny_model, n_envs=4, max_steps=8).run(make_group(*tasks, first_seed=3))
        return [part.steps for part in sorted(parts, key=lambda part: part.cell.id)]

    alone, together, other = steps("walk"), steps("walk", "short", "run", "cliff"), steps("walk", "run")
    assert alone[0] == together[0] == other[0]


def test_finished_episodes_are_left_alone_and_environments_reused() -> None:
    runner = make_runner(None)
    list(runner.run(make_group("short", "walk", first_seed=2)))
    made = dict(runner.environments._idle)
    assert made["short"].n_made_steps == 2 and made["walk"].n_made_steps == 6
    list(runner.run(make_group("walk", "short")))
    assert dict(runner.environments._idle) == made
    assert runner.timing.episodes == 4 and runner.timing.env_steps == 2 + 6 + 3 + 2
    runner.environments.limit = 1
    list(runner.run(make_group("run", "cliff")))
    assert [task for task, _ in runner.environments._idle] == ["cliff"]
    runner.environments.close()


def test_a_failing_hook_leaves_no_trace(tiny_model: HookedVLA) -> None:
    def fail(value, hook):
        raise ArithmeticError("no")

    arm = FunctionArm("fails", (("vlm.blocks.0.hook_resid_pre", fail),), "fails")
    runner = make_runner(tiny_model, (arm,), n_envs=2)
    text = tiny_model.processor.tokenizer.features
    with pytest.raises(ArithmeticError):
        list(runner.run(make_group("walk", "short", arm="fails")))
    assert not any(point.listeners for point in tiny_model.points.values())
    assert tiny_model.run_state.env_step is None and tiny_model.processor.tokenizer.features is text
    assert len(runner.environments._idle) == 2


def test_actions_that_are_not_finite_name_the_episode(tiny_model: HookedVLA) -> None:
    arm = FunctionArm("nan", (("head.hook_actions", lambda value, hook: value * float("nan")),), "NaN")
    with pytest.raises(ValueError, match=r"episode 0 \(arm 'nan', task 'walk', seed 0\), environment step 0.*finite"):
        list(make_runner(tiny_model, (arm,), n_envs=1).run(make_group("walk", arm="nan")))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"d_action": 7}, {}, "actions of width 4, but the environments of the suite 'toy' take 7"),
        ({}, {"n_action_steps": 9}, "n_action_steps is 9, but the model 'toy model' plans 8 steps"),
        ({"cameras": ("top",)}, {}, r"sees cameras \['agent', 'wrist'\].*shows \['top'\].*cameras=\{'agent': 'top'\}"),
        ({}, {"cameras": {"agent": "nose"}}, r"no cameras \['nose'\]; it has \['agent', 'wrist'\]"),
        ({}, {"n_envs": 0}, "n_envs must be at least 1, got 0"),
        ({}, {"max_steps": 0}, "max_steps must be at least 1, got 0"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(tiny_model: HookedVLA, changes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner(tiny_model, suite=toy_suite(**changes), **options)


def test_a_state_that_the_model_does_not_take_is_refused() -> None:
    model = HookedVLA.from_spec("act", "tiny", seed=0)
    model.processor.features = replace(model.processor.features, d_state=6)
    with pytest.raises(ValueError, match=r"'toy model' cannot act on what the suite 'toy' shows: .*state must be"):
        make_runner(model, n_envs=1)


def test_cameras_may_have_other_names(tiny_model: HookedVLA) -> None:
    frame, _ = ToyEnv("walk", CAMERAS, 64).reset(seed=0)
    plain, swapped = (
        make_runner(tiny_model, n_envs=1, cameras=cameras).actor
        for cameras in (None, {"agent": "wrist", "wrist": "agent"})
    )
    seen, other = (prepare(tiny_model, each.settings, [frame]).images for each in (plain, swapped))
    assert torch.equal(other, seen.flip(1))
    assert plain.settings.image_size == 64


def test_a_suite_without_expert_says_so() -> None:
    with pytest.raises(ValueError, match="'toy' has no scripted expert"):
        ExpertActor(toy_suite(expert=None))
