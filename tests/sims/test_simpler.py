import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import simpler_stand_ins
from episodes import check_conventions, check_neighbours, require

require("mani_skill", "simpler")

# ManiSkill decides where its data are when it is imported
os.environ.setdefault("MS_ASSET_DIR", tempfile.mkdtemp(prefix="stand-ins-"))

import mani_skill  # noqa: E402

from hooked_vla.rollouts import simpler  # noqa: E402
from hooked_vla.rollouts.simpler import SUITES, SimplerEnv  # noqa: E402

TABLE, SINK = SUITES["simpler_bridge"], SUITES["simpler_bridge_sink"]


@pytest.fixture(scope="module")
def drawing() -> None:
    """SimplerEnv with its data, or stand-ins, and a Vulkan driver; skipped with its own words without one."""
    if not (mani_skill.ASSET_DIR / "tasks").exists():
        simpler_stand_ins.make(Path(mani_skill.ASSET_DIR))
    try:
        env = TABLE.make("carrot_on_plate", TABLE.cameras, 48)
        env.reset(seed=0)
    except RuntimeError as error:
        if "Vulkan" not in str(error):
            raise
        pytest.skip(str(error))
    env.close()


def test_missing_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mani_skill, "ASSET_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wx250s\.urdf.*download_asset bridge_v2_real2sim.*widowx250s"):
        TABLE.make("carrot_on_plate", (), 48)


def test_missing_driver_is_named():
    with (
        pytest.raises(RuntimeError, match=r"draws through Vulkan.*ErrorIncompatibleDriver.*Mesa 24\.3"),
        simpler._vulkan(),
    ):
        raise RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver")
    with pytest.raises(RuntimeError, match="^out of luck$"), simpler._vulkan():
        raise RuntimeError("out of luck")


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(("suite", "task"), [(suite, task.id) for suite in (TABLE, SINK) for task in suite.tasks])
def test_conventions(suite, task):
    check_conventions(suite, task, image_size=48)


@pytest.mark.usefixtures("drawing")
def test_environments_draw_their_own_scene():
    """ManiSkill keeps the background photograph on the class."""
    check_neighbours(TABLE.make("carrot_on_plate", ("agent",), 48), SINK.make("eggplant_in_basket", ("agent",), 48))


@pytest.mark.usefixtures("drawing")
def test_instructions_and_starts_are_the_packages():
    for suite in (TABLE, SINK):
        for task in suite.tasks:
            env = suite.make(task.id, (), 48)
            assert isinstance(env, SimplerEnv)
            assert env.simulator.get_language_instruction() == [task.instruction]
            first = env.reset(seed=1)[0]["state"]
            assert np.array_equal(env.reset(seed=25)[0]["state"], first)
            env.close()
