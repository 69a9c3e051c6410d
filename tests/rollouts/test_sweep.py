"""Sweeps: the same call gives the same bytes, also in pieces; arms share seeds and noise, rows of a batch nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from toy_suite import ToyEnv, toy_suite

from hooked_vla import HookedVLA
from hooked_vla.rollouts.arms import BASELINE, FunctionArm
from hooked_vla.rollouts.cells import Scene, spread_scenes
from hooked_vla.rollouts.executor import LocalExecutor
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import make_plan, run_plans, run_rollouts

SMALL = Options(n_envs=4, max_steps=6, n_action_steps=4)


def shift(value, hook):
    return value + torch.linspace(-1, 1, value.shape[-1])


def shift_late(value, hook):
    return shift(value, hook) if hook.run.env_step >= 4 else None


EDIT = FunctionArm("edit", (("expert.blocks.0.hook_resid_pre", shift),), "shifts")
LATE = FunctionArm("late", (("expert.blocks.0.hook_resid_pre", shift_late),), "shifts from step 4 on")
INERT = FunctionArm("inert", (("expert.blocks.0.hook_resid_pre", lambda value, hook: value.clone()),), "copies")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def actions(folder: Path, arm: str) -> dict[tuple[int, int], list[float]]:
    """Of every step of an arm: its action, by seed and environment step."""
    done = read_steps(folder)
    about = {row["episode"]: row for row in read_episodes(folder).to_pylist()}
    return {
        (about[row["episode"]]["seed"], row["env_step"]): row["action"]
        for row in done.to_pylist()
        if about[row["episode"]]["arm"] == arm
    }


def test_the_same_call_gives_the_same_bytes_and_does_nothing_the_second_time(
    tmp_path: Path, tiny_model: HookedVLA
) -> None:
    for name in ("first", "second", "first"):
        done = run_rollouts(tiny_model, toy_suite(), 5, 50, out=tmp_path / name, options=SMALL)
        assert (done.summary["baseline"].overall.episodes, done.episodes.num_rows) == (5, 5)
    assert done.timing.episodes == 0
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert [row["seed"] for row in done.episodes.to_pylist()] == list(range(50, 55))


def test_what_is_missing_comes_out_as_it_was(tmp_path: Path, tiny_model: HookedVLA) -> None:
    """Episodes that are missing anywhere in a group: the others of the group run again, and stay as they are."""
    plan = make_plan(tiny_model, toy_suite(), spread_scenes(["walk", "run"], 5, 50), (BASELINE, EDIT), SMALL)
    run_plans([plan], [tmp_path], loaded={0: tiny_model})
    whole = files(tmp_path)
    for lost in ([0], [1, 4, 6, 8]):
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet") if int(path.stem) not in lost}
        for path in tmp_path.rglob("*.parquet"):
            if int(path.stem) in lost:
                path.unlink()
        [done] = run_plans([plan], [tmp_path], loaded={0: tiny_model})
        assert files(tmp_path) == whole and done.timing.episodes < 10
        assert times == {path: path.stat().st_mtime_ns for path in times}


def test_arms_share_noise_and_an_edit_acts_when_it_says(tmp_path: Path, tiny_model: HookedVLA) -> None:
    arms = (BASELINE, INERT, EDIT, LATE)
    run_rollouts(tiny_model, toy_suite(), 4, 3, ["walk"], arms, tmp_path, SMALL)
    baseline, edit, late = (actions(tmp_path, arm) for arm in ("baseline", "edit", "late"))
    assert baseline == actions(tmp_path, "inert")
    assert not any(baseline[at] == edit[at] for at in baseline.keys() & edit.keys())
    both = baseline.keys() & late.keys()
    assert {step for _, step in both} == set(range(6))
    assert all((baseline[at] == late[at]) == (at[1] < 4) for at in both)


def test_arms_in_one_batch_are_as_if_each_had_its_own(tmp_path: Path, tiny_model: HookedVLA) -> None:
    scenes, options = spread_scenes(["walk"], 2, 3), Options(n_envs=6, max_steps=6, n_action_steps=4)
    packed = make_plan(tiny_model, toy_suite(), scenes, (BASELINE, EDIT, LATE), options)
    assert [len(group.cells) for group in packed.groups] == [6]
    run_plans([packed], [tmp_path / "packed"])
    for arm in (BASELINE, EDIT, LATE):
        run_plans([make_plan(tiny_model, toy_suite(), scenes, (arm,), options)], [tmp_path / arm.name])
        assert actions(tmp_path / "packed", arm.name) == actions(tmp_path / arm.name, arm.name)


def test_an_episode_does_not_depend_on_how_many_there_are(tmp_path: Path, tiny_model: HookedVLA) -> None:
    """Nor on the others' instructions, which are of other lengths."""
    for name, tasks in (("one", ["walk"]), ("all", ["walk", "run", "cliff", "short"])):
        scenes = [Scene(task, 9 + i) for i, task in enumerate(tasks)]
        run_plans([make_plan(tiny_model, toy_suite(), scenes, options=SMALL)], [tmp_path / name])
    assert read_steps(tmp_path / "one") == read_steps(tmp_path / "all", [0])


def test_several_models_share_an_executor(tmp_path: Path) -> None:
    scenes = spread_scenes(["walk", "run"], 3, 0)
    models = [ModelSource("smolvla", "tiny"), ModelSource("act", "tiny", seed=2), "expert"]
    plans = [make_plan(model, toy_suite(), scenes, options=SMALL) for model in models]
    together = run_plans(plans, [tmp_path / "0", tmp_path / "1", None])
    assert [done.summary["baseline"].overall.episodes for done in together] == [3, 3, 3]
    assert [done.plan.manifest["model"]["name"] for done in together] == ["smolvla", "act", "expert"]
    [alone] = run_plans(plans[1:2], [tmp_path / "alone"])
    assert files(tmp_path / "alone") == files(tmp_path / "1") and alone.episodes == together[1].episodes
    with pytest.raises(ValueError, match="3 plans, but 1 folders"):
        run_plans(plans, [None])


def test_what_a_simulator_lacks_is_found_before_anything_is_written(tmp_path: Path) -> None:
    def lacking(task: str, cameras: Sequence[str], image_size: int) -> ToyEnv:
        raise FileNotFoundError("the data files lack scene.xml")

    for model in ("expert", ModelSource("act", "tiny")):
        with pytest.raises(FileNotFoundError, match=r"lack scene\.xml"):
            run_rollouts(model, toy_suite(make=lacking), 2, 0, out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_expert_gets_there_and_results_need_no_folder() -> None:
    done = run_rollouts("expert", toy_suite(), 6, 0, ["walk", "run"])
    assert done.folder is None and done.summary["baseline"].overall.success_rate == 1.0
    assert list(done.summary["baseline"].by_task) == ["walk", "run"]


def test_another_model_or_seed_in_the_same_folder_is_refused(tmp_path: Path, tiny_model: HookedVLA) -> None:
    run_rollouts(tiny_model, toy_suite(), 2, 0, out=tmp_path, options=SMALL)
    before = files(tmp_path)
    other = HookedVLA.from_spec("smolvla", "tiny", seed=1)
    with pytest.raises(ValueError, match="other settings: model.weights"):
        run_rollouts(other, toy_suite(), 2, 0, out=tmp_path, options=SMALL)
    with pytest.raises(ValueError, match="other settings: scenes"):
        run_rollouts(tiny_model, toy_suite(), 2, 1, out=tmp_path, options=SMALL)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smolvla", "nowhere", 1, 0), "unknown suite 'nowhere'; suites"),
        ((ModelSource("smolvla"), toy_suite(), 1, 0), "'smolvla' has actions of width 6.*'toy' take 4"),
        ((ModelSource("smolvla", "huge"), toy_suite(), 1, 0), "unknown size 'huge'"),
        (("expert", toy_suite(), 1, 0, ["fly"]), "unknown task 'fly' in the suite 'toy'"),
        (("expert", toy_suite(), 0, 0), "episodes must be at least 1, got 0"),
        (("expert", toy_suite(), 1, 0, None, ()), "no arms"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_rollouts(*arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_watchers_and_processes_do_not_go_together(tiny_model: HookedVLA) -> None:
    with pytest.raises(ValueError, match="watchers look on in this process"):
        run_rollouts(tiny_model, toy_suite(), 1, 0, executor=LocalExecutor(2), watchers=[Watcher()])


def test_more_episodes_than_starts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    run_rollouts("expert", toy_suite(n_starts=3), 4, 0, ["walk"])
    assert "4 episodes of 'walk', but the suite 'toy' has 3 starts" in caplog.text


def test_an_environment_that_fails_leaves_whole_episodes(tmp_path: Path) -> None:
    class Breaks(ToyEnv):
        def step(self, action):
            if self.t == 4:
                raise FloatingPointError("unstable")
            return super().step(action)

    suite = toy_suite(make=Breaks)
    with pytest.raises(FloatingPointError):
        run_rollouts("expert", suite, 4, 0, ["walk"], out=tmp_path)
    # goals 3, 4, 5, 6 steps away: two got there
    assert sorted(path.stem for path in (tmp_path / "episodes").rglob("*.parquet")) == ["000000000", "000000001"]
    run_rollouts("expert", toy_suite(), 4, 0, ["walk"], out=tmp_path)
    run_rollouts("expert", toy_suite(), 4, 0, ["walk"], out=tmp_path / "whole")
    assert files(tmp_path / "whole").items() <= files(tmp_path).items()
