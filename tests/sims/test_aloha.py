import numpy as np
import pytest
from episodes import check_conventions, check_neighbours, expert_episode, require
from recorded import check_closed_loop, check_demonstration

require("gym_aloha", "aloha")

from gym_aloha.env import AlohaEnv as GymAloha  # noqa: E402

from hooked_vla.rollouts.aloha import SUITES  # noqa: E402

TRANSFER, INSERTION = SUITES["aloha_transfer_cube"], SUITES["aloha_insertion"]


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_conventions(suite):
    check_conventions(suite, suite.tasks[0].id)


def test_environments_draw_their_own_scene():
    check_neighbours(
        TRANSFER.make("transfer_cube", TRANSFER.cameras, 32), INSERTION.make("insertion", INSERTION.cameras, 48)
    )


def test_two_environments_of_one_task_keep_their_own_cube():
    """gym-aloha passes the cube's place through a global."""
    one, two = (TRANSFER.make("transfer_cube", (), 32) for _ in range(2))
    one.reset(seed=0)
    before = one.unwrapped.data.qpos[16:].copy()
    two.reset(seed=1)
    assert np.array_equal(one.unwrapped.data.qpos[16:], before)
    assert not np.array_equal(two.unwrapped.data.qpos[16:], before)


def test_it_is_gym_aloha_with_less_drawing(monkeypatch):
    monkeypatch.setenv("HOOKED_VLA_RENDER", "full")
    env = TRANSFER.make("transfer_cube", ("top",), 480)
    reference = GymAloha("transfer_cube", obs_type="pixels_agent_pos")
    ours, theirs = env.reset(seed=5)[0], reference.reset(seed=5)[0]
    for action in [np.zeros(14), np.full(14, 0.1)]:
        assert ours["pixels"]["top"].shape == (480, 640, 3)
        assert np.array_equal(ours["pixels"]["top"], theirs["pixels"]["top"])
        assert np.array_equal(ours["state"], theirs["agent_pos"].astype(np.float32))
        ours, reward, *_ = env.step(action)
        theirs, expected, *_ = reference.step(action)
        assert reward == expected
    env.close()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_expert_solves(suite, seed):
    solved, n_steps = expert_episode(suite, suite.tasks[0].id, seed)
    assert solved and n_steps < suite.max_steps


def test_expert_starts_anew_with_the_episode():
    assert INSERTION.expert is not None
    env, act = INSERTION.make("insertion", (), 32), INSERTION.expert("insertion")
    env.reset(seed=0)
    first = [act(env)]
    for _ in range(20):
        env.step(act(env))
    env.reset(seed=0)
    assert np.array_equal(first[0], act(env))


def test_expert_asked_late_says_so():
    assert INSERTION.expert is not None
    env, act = INSERTION.make("insertion", (), 32), INSERTION.expert("insertion")
    env.reset(seed=0)
    env.step(np.zeros(14))
    with pytest.raises(RuntimeError, match="plans from an episode's start"):
        act(env)


def test_policy_acts_in_closed_loop(tmp_path):
    check_closed_loop(TRANSFER, "transfer_cube", tmp_path)


def test_demonstration_is_recorded(tmp_path):
    check_demonstration(TRANSFER, "transfer_cube", 3, tmp_path)
