import numpy as np
import pytest
from episodes import check_conventions, check_neighbours, require
from recorded import check_closed_loop

require("gym_pusht", "pusht")

from gym_pusht.envs.pusht import PushTEnv as GymPushT  # noqa: E402

from hooked_vla.rollouts.pusht import SUITES  # noqa: E402
from hooked_vla.rollouts.sweep import run_rollouts  # noqa: E402

SUITE = SUITES["pusht"]


def test_conventions():
    check_conventions(SUITE, "pusht")


def test_environments_draw_their_own_scene():
    check_neighbours(SUITE.make("pusht", ("top",), 32), SUITE.make("pusht", ("top",), 48))


def test_it_is_gym_pusht():
    env, reference = SUITE.make("pusht", ("top",), 96), GymPushT(obs_type="pixels_agent_pos")
    ours, theirs = env.reset(seed=7)[0], reference.reset(seed=7)[0]
    for _ in range(3):
        assert np.array_equal(ours["pixels"]["top"], theirs["pixels"])
        assert np.array_equal(ours["state"], theirs["agent_pos"].astype(np.float32))
        ours, reward, *_ = env.step([200, 300])
        theirs, expected, *_ = reference.step(np.array([200.0, 300.0]))
        assert reward == expected


def test_covering_the_outline_solves_it():
    env = SUITE.make("pusht", (), 96)
    env.reset(seed=0)
    simulator = env.unwrapped.simulator
    # the finger out of the way
    for _ in range(10):
        assert not env.step([20, 20])[2]
    # the outline's own pose, which `_set_state` would shift
    simulator.block.angle = simulator.goal_pose[2]
    simulator.block.position = simulator.goal_pose[:2].tolist()
    _, reward, terminated, _, info = env.step([20, 20])
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


def test_policy_acts_in_closed_loop(tmp_path):
    check_closed_loop(SUITE, "pusht", tmp_path)


def test_there_is_no_expert():
    assert SUITE.expert is None
    with pytest.raises(ValueError, match="the suite 'pusht' has no scripted expert"):
        run_rollouts("expert", SUITE, 1, 0)
