"""What adapters to public benchmarks share, and what they say where their simulator is absent."""

import importlib
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from hooked_vla.rollouts.adapter import AdapterEnv, adapter_env
from hooked_vla.rollouts.suites import SuiteTask, get_suite, list_suites

# suite -> a package that its adapter cannot do without, and what it tells to install
NEEDS = {
    "libero_goal": ("libero", r"hooked-vla\[libero\].*--no-deps hf-libero"),
    "metaworld": ("metaworld", r"hooked-vla\[metaworld\]"),
    "aloha_insertion": ("gym_aloha", r"hooked-vla\[aloha\]"),
    "pusht": ("gym_pusht", r"hooked-vla\[pusht\]"),
    "simpler_bridge": ("mani_skill", r"hooked-vla\[simpler\]"),
}


class Counter(AdapterEnv):
    """Shows its seed; solved when the action is all ones."""

    def __init__(self, cameras=("front",), image_shape=(4, 6)):
        super().__init__(
            SuiteTask("count", "count to one"), cameras, ("front",), image_shape, 1, [-1.0, 0.0], [1.0, 1.0]
        )
        self.seed = -1

    def image(self, camera):
        return np.full((*self.image_shape, 3), self.seed % 256, np.uint8)

    def _start(self, seed):
        self.seed = seed

    def _advance(self, action):
        return 0.5, bool((action == 1).all())

    def _state(self):
        return np.array([self.seed], np.float32)


@pytest.mark.parametrize("suite", NEEDS)
def test_absent_simulator_is_said_to_be(suite, monkeypatch):
    package, remedy = NEEDS[suite]
    for name in [name for name in sys.modules if name.startswith(("hooked_vla.rollouts.", f"{package}."))]:
        if name.split(".")[-1] != "suites":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"(?s)is not installed;.*{remedy}"):
        get_suite(suite)


def test_suites_are_listed_without_importing_a_simulator():
    code = (
        "import sys; from hooked_vla.rollouts.suites import list_suites; print(len(list_suites())); "
        f"print([name for name in {[package for package, _ in NEEDS.values()]} + ['mujoco'] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{len(list_suites())}\n[]\n", done.stderr
    assert set(NEEDS) < set(list_suites())


def test_observation_and_info():
    env = Counter()
    obs, info = env.reset(seed=7)
    assert env.observation_space.contains(obs)
    assert obs["pixels"]["front"].shape == (4, 6, 3) and obs["instruction"] == "count to one"
    assert info == {"is_success": False, "instruction": "count to one"}
    assert env.step([1, 0])[1:] == (0.5, False, False, info)
    assert env.step([1, 1])[1:] == (0.5, True, False, info | {"is_success": True})
    assert env.n_steps == 2
    env.reset(seed=7)
    assert env.n_steps == 0
    assert np.array_equal(env.render(), obs["pixels"]["front"])


def test_reset_without_a_seed_goes_on_from_the_last():
    env = Counter()
    env.reset(seed=7)
    first = [env.reset()[0]["state"][0] for _ in range(3)]
    env.reset(seed=7)
    assert [env.reset()[0]["state"][0] for _ in range(3)] == first
    assert len(set(first)) == 3


@pytest.mark.parametrize("action", [[0], [0, 0, 0], [[0, 0]], [0, np.nan], [np.inf, 0]])
def test_wrong_action_is_refused(action):
    env = Counter()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="an action of 'count' is 2 finite numbers"):
        env.step(action)
    assert env.n_steps == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"unknown cameras \['back'\] of Counter; cameras: \['front'\]"):
        Counter(cameras=("back",))
    with pytest.raises(ValueError, match="images of 0 × 6 pixels"):
        Counter(image_shape=(0, 6))
    with pytest.raises(ValueError, match=r"no reset options, got \['colour'\]"):
        Counter().reset(seed=0, options={"colour": 1})
    with pytest.raises(ValueError, match="made without cameras"):
        Counter(cameras=()).render()


def test_experts_find_their_environment_under_wrappers():
    env = Counter()
    assert adapter_env(gymnasium.wrappers.TimeLimit(env, 5), Counter) is env
    with pytest.raises(TypeError, match="acts in Other, got Counter"):
        adapter_env(env, type("Other", (Counter,), {}))


def test_every_adapter_is_a_module():
    for name in ("libero", "metaworld", "aloha", "pusht", "simpler", "tabletop"):
        assert importlib.util.find_spec(f"hooked_vla.rollouts.{name}") is not None
