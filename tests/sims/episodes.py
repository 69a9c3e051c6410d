"""What the tests of simulators share: whether one is here, and episodes to compare."""

import importlib.util
import os
from typing import Any

import gymnasium
import numpy as np
import pytest

from hooked_vla.rollouts.suites import Suite

REQUIRED_VARIABLE = "HOOKED_VLA_REQUIRED_SIMS"


def require(package: str, extra: str) -> None:
    """Skip the module where a simulator's package is absent; fail where HOOKED_VLA_REQUIRED_SIMS names it."""
    if importlib.util.find_spec(package) is None:
        reason = f"{package} is not installed: pip install hooked-vla[{extra}]"
        if extra in os.environ.get(REQUIRED_VARIABLE, "").split():
            raise RuntimeError(f"{REQUIRED_VARIABLE} names {extra!r}, but {reason}")
        pytest.skip(reason, allow_module_level=True)


def frames(env: gymnasium.Env[dict[str, Any], Any], seed: int, n_steps: int) -> list[dict[str, Any]]:
    """Observations of an episode's first steps under random actions, which its seed draws too."""
    return list(walk(env, seed, n_steps))


def walk(env: gymnasium.Env[dict[str, Any], Any], seed: int, n_steps: int):
    """`frames`, one at a time."""
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    actions = np.random.default_rng(seed)
    yield env.reset(seed=seed)[0]
    for _ in range(n_steps):
        yield env.step(actions.uniform(space.low, space.high))[0]


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Bit for bit, and of the same length."""
    return len(first) == len(second) and all(
        np.array_equal(a["state"], b["state"])
        and a["instruction"] == b["instruction"]
        and a["pixels"].keys() == b["pixels"].keys()
        and all(np.array_equal(a["pixels"][camera], b["pixels"][camera]) for camera in a["pixels"])
        for a, b in zip(first, second, strict=True)
    )


def check_conventions(suite: Suite, task: str, image_size: int = 32, seeds: tuple[int, int] = (3, 4)) -> None:
    """Shapes as the suite declares them; the same seed shows the same bits whatever came before, another does not."""
    env = suite.make(task, suite.cameras, image_size)
    try:
        first = frames(env, seeds[0], 4)
        for obs in first:
            assert env.observation_space.contains(obs), env.observation_space
            assert tuple(obs["pixels"]) == suite.cameras
            assert obs["state"].shape == (suite.d_state,) and obs["state"].dtype == np.float32
            assert obs["instruction"] == suite.task(task).instruction
            for image in obs["pixels"].values():
                assert image.shape[0] == image_size and image.dtype == np.uint8 and image.std() > 5
        assert env.action_space.shape == (suite.d_action,)
        other = frames(env, seeds[1], 4)
        assert same(first, frames(env, seeds[0], 4)), "the same seed showed another episode"
        assert not same(first, other), "another seed showed the same episode"
        assert env.reset(seed=0)[1] == {"is_success": False, "instruction": suite.task(task).instruction}
        with pytest.raises(ValueError, match=f"{suite.d_action} finite numbers"):
            env.step(np.zeros(suite.d_action + 1))
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(np.full(suite.d_action, np.nan))
    finally:
        env.close()


def check_neighbours(one: gymnasium.Env[dict[str, Any], Any], two: gymnasium.Env[dict[str, Any], Any]) -> None:
    """Two environments that take turns show, bit for bit, what each shows alone."""
    alone = frames(one, 0, 3), frames(two, 1, 3)
    turns = list(zip(walk(one, 0, 3), walk(two, 1, 3), strict=True))
    assert same([a for a, _ in turns], alone[0])
    assert same([b for _, b in turns], alone[1])


def expert_episode(suite: Suite, task: str, seed: int) -> tuple[bool, int]:
    """Whether the scripted expert solves an episode, undrawn, and in how many steps."""
    assert suite.expert is not None
    env, act = suite.make(task, (), 32), suite.expert(task)
    try:
        env.reset(seed=seed)
        for step in range(suite.max_steps):
            _, _, terminated, _, info = env.step(act(env).astype(np.float32))
            assert terminated == info["is_success"]
            if terminated:
                return True, step + 1
        return False, suite.max_steps
    finally:
        env.close()
