import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hooked_vla import HookedVLA, rollouts
from hooked_vla.rollouts.tabletop import BLOCKS, ENV_ID, PADS, TabletopEnv, observation

OPEN, CLOSED = -1.0, 1.0


@pytest.fixture
def env():
    env = TabletopEnv(image_size=48)
    yield env
    env.close()


def episode(env: TabletopEnv, seed: int, n_steps: int = 6) -> list[dict]:
    obs, info = env.reset(seed=seed)
    seen, actions = [obs | info["poses"]["blocks"]], np.random.default_rng(seed)
    for _ in range(n_steps):
        obs, _, _, _, info = env.step(actions.uniform(-1, 1, 4))
        seen.append(obs | info["poses"]["blocks"])
    return seen


def same(first: dict, second: dict) -> bool:
    pixels = all(np.array_equal(first["pixels"][camera], second["pixels"][camera]) for camera in first["pixels"])
    return pixels and all(np.array_equal(first[key], second[key]) for key in ("state", *BLOCKS))


def move_to(env: TabletopEnv, target: np.ndarray, gripper: float, n_steps: int = 40) -> dict:
    """Drive the point between the finger tips to a place; returns the last info."""
    info = {}
    for _ in range(n_steps):
        offset = target - env.data.site("grip").xpos
        info = env.step(np.array([*np.clip(offset / 0.03, -1, 1), gripper]))[-1]
    return info


def test_same_seed_gives_same_bits_whatever_came_before(env):
    first = episode(env, seed=3)
    episode(env, seed=4)
    assert all(same(a, b) for a, b in zip(first, episode(env, seed=3), strict=True))
    assert not same(first[0], episode(env, seed=4, n_steps=0)[0])


def test_environments_in_one_process_render_their_own_scene():
    alone, other = TabletopEnv(image_size=48), TabletopEnv(image_size=64)
    first, second = episode(alone, seed=0), episode(other, seed=1)
    obs_a, _ = alone.reset(seed=0)
    obs_b, _ = other.reset(seed=1)
    actions_a, actions_b = np.random.default_rng(0), np.random.default_rng(1)
    for expected_a, expected_b in zip(first, second, strict=True):
        for camera in ("agent", "wrist"):
            assert np.array_equal(obs_a["pixels"][camera], expected_a["pixels"][camera])
            assert np.array_equal(obs_b["pixels"][camera], expected_b["pixels"][camera])
        obs_a = alone.step(actions_a.uniform(-1, 1, 4))[0]
        obs_b = other.step(actions_b.uniform(-1, 1, 4))[0]
    alone.close()
    other.close()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_gripper_moves_along_the_action(env, axis, sign):
    before = env.reset(seed=0)[0]["state"]
    action = np.zeros(4)
    action[axis], action[3] = sign, OPEN
    for _ in range(4):
        after = env.step(action)[0]["state"]
    moved = after[:3] - before[:3]
    assert sign * moved[axis] > 0.03
    assert np.abs(np.delete(moved, axis)).max() < 1e-3


def test_fingers_close_and_open(env):
    env.reset(seed=0)
    gaps = []
    for gripper in (CLOSED, OPEN):
        for _ in range(10):
            obs = env.step([0, 0, 0, gripper])[0]
        gaps.append(obs["state"][3])
    assert gaps == pytest.approx([0.0, 0.07], abs=2e-3)


def test_block_is_carried_to_the_pad_by_contact(env):
    _, info = env.reset(seed=0)
    block = info["poses"]["blocks"]["red"][:3]
    above = np.array([0, 0, 0.1])
    move_to(env, block + above, OPEN)
    move_to(env, block, OPEN)
    move_to(env, block, CLOSED, 8)
    assert env.data.joint("finger_right").qpos[0] > 0.015
    lifted = move_to(env, block + above, CLOSED)
    assert lifted["poses"]["blocks"]["red"][2] > 0.08 and not lifted["is_success"]
    pad = np.array([*PADS["orange"].xy, block[2]])
    move_to(env, pad + above, CLOSED)
    move_to(env, pad, CLOSED)
    assert move_to(env, pad, OPEN, 5)["is_success"]


def test_success_is_the_named_block_on_the_named_pad(env):
    _, info = env.reset(seed=0)
    x, y = info["poses"]["pads"]["orange"]
    assert not info["is_success"]
    env.set_block("blue", (x, y, 0.022))
    assert not env.step(np.zeros(4))[-1]["is_success"]
    env.reset(seed=0)
    env.set_block("red", (x, y, 0.2))
    assert not env.is_success
    env.set_block("red", (x, y, 0.022))
    _, reward, terminated, truncated, info = env.step(np.zeros(4))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 4)), [0, 0, np.nan, 0], [np.inf, 0, 0, 0]])
def test_bad_action_is_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(action)


def test_unknown_names_are_refused():
    for wrong in ({"block": "pink"}, {"pad": "pink"}, {"render_mode": "human"}):
        with pytest.raises(ValueError, match="unknown"):
            TabletopEnv(**wrong)


@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_and_accepts_it():
    env = gymnasium.make(ENV_ID, image_size=32, block="green", pad="cyan")
    assert env.spec is not None and env.spec.max_episode_steps == 200
    check_env(env.unwrapped)
    obs, _ = env.reset(seed=0)
    assert obs["instruction"] == "put the green block on the cyan pad"
    assert np.array_equal(env.render(), obs["pixels"]["agent"])
    env.close()


def test_agent_image_is_upright_with_x_to_the_right(env):
    env.reset(seed=0)
    image = env.render().astype(int)
    orange = (image[..., 0] > 180) & (image[..., 1] > 90) & (image[..., 1] < 150) & (image[..., 2] < 60)
    cyan = (image[..., 0] < 80) & (image[..., 1] > 150) & (image[..., 2] > 150)
    assert orange.any() and cyan.any()
    assert np.argwhere(orange)[:, 0].max() < 24 and np.argwhere(cyan)[:, 0].max() < 24
    assert np.argwhere(orange)[:, 1].max() < 24 < np.argwhere(cyan)[:, 1].min()


def test_policy_takes_the_observation(env, tiny_model: HookedVLA):
    obs, _ = env.reset(seed=0)
    action = tiny_model.select_action(observation(obs))
    assert action.shape == (1, 4)
    env.step(action[0])


def test_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError, match=r"mujoco.*pip install hooked-vla\[sim\]"), rollouts.needs_sim_extra():
        import mujoco  # noqa: F401
