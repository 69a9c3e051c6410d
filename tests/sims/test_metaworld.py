import numpy as np
import pytest
from episodes import check_conventions, check_neighbours, expert_episode, require
from experimenting import check_experiments
from recorded import check_closed_loop, check_demonstration

require("metaworld", "metaworld")

from metaworld.env_dict import ENV_CLS_MAP  # noqa: E402

from hooked_vla.rollouts.metaworld import CAMERAS, MAX_STEPS, SUITES  # noqa: E402

SUITE = SUITES["metaworld"]


def test_every_task_has_an_instruction_of_its_own():
    assert {f"{task.id}-v3" for task in SUITE.tasks} == set(ENV_CLS_MAP)
    assert len({task.instruction for task in SUITE.tasks}) == len(SUITE.tasks) == 50


def test_the_step_limit_is_the_simulators():
    env = SUITE.make("reach", (), 32)
    assert env.unwrapped.simulator.max_path_length == MAX_STEPS
    env.reset(seed=0)
    for _ in range(MAX_STEPS):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros(4))


@pytest.mark.parametrize("task", ["pick-place", "door-open"])
def test_conventions(task):
    check_conventions(SUITE, task)


def test_environments_draw_their_own_scene():
    check_neighbours(SUITE.make("hammer", SUITE.cameras, 32), SUITE.make("window-open", SUITE.cameras, 48))


def test_agent_image_is_corner2_turned_upright(monkeypatch):
    """As gymnasium draws it, from the place that the public data sets use."""
    monkeypatch.setenv("HOOKED_VLA_RENDER", "full")
    env = SUITE.make("pick-place", ("agent",), 64)
    ours = env.reset(seed=0)[0]["pixels"]["agent"]
    simulator = ENV_CLS_MAP["pick-place-v3"](render_mode="rgb_array", camera_name="corner2", width=64, height=64)
    simulator._freeze_rand_vec, simulator.seeded_rand_vec, simulator._set_task_called = False, True, True
    simulator.model.camera("corner2").pos[:] = (0.75, 0.075, 0.7)
    simulator.seed(0)
    simulator.reset()
    assert np.array_equal(ours, simulator.render()[::-1, ::-1])
    assert set(CAMERAS) == set(SUITE.cameras)
    env.close()
    simulator.close()


@pytest.mark.parametrize("task", ["reach", "drawer-open", "button-press", "pick-place", "window-close"])
def test_scripted_policy_solves(task):
    solved, n_steps = expert_episode(SUITE, task, seed=0)
    assert solved and n_steps < MAX_STEPS


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"unknown task 'juggle'.*'assembly'"):
        SUITE.make("juggle", (), 32)
    assert SUITE.expert is not None
    with pytest.raises(ValueError, match="unknown task 'juggle'"):
        SUITE.expert("juggle")


def test_policy_acts_in_closed_loop(tmp_path):
    check_closed_loop(SUITE, "pick-place", tmp_path)


def test_demonstration_is_recorded(tmp_path):
    check_demonstration(SUITE, "button-press", 3, tmp_path)


def test_experiments_run(tmp_path):
    check_experiments(SUITE, SUITE, tmp_path)
