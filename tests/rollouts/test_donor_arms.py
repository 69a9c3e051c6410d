"""Donors in closed loop: the same model, on the same observation, told something else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_suite import tiny, toy_suite

from hooked_vla import HookedVLA
from hooked_vla.analysis.subspaces import random_subspace
from hooked_vla.rollouts.arms import BASELINE, Arm, ObservingArm, describe_arms
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.experiments.kinds.subspace_arms import DonorArm, twin_of
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.settings import Options, settle
from hooked_vla.rollouts.sweep import run_rollouts

EMBED, LATER = "vlm.hook_tokens", "vlm.blocks.0.hook_resid_post"
OPTIONS = Options(n_envs=3, n_action_steps=4, image_size=16, max_steps=8)
DONORS = {"walk": "go home", "short": "go home"}


def donor(name: str, site: str = EMBED, donors: dict[str, str] = DONORS, **changes: Any) -> DonorArm:
    model, suite = tiny("smolvla"), toy_suite()
    given: dict[str, Any] = {"tokens": "language", "subspace": None, "strength": 1.0} | changes
    return DonorArm(name, donors, site, twin=twin_of(model), settings=settle(OPTIONS, "m", model, suite), **given)


def actions_of(folder: Path, arms: list[Arm]) -> dict[str, np.ndarray]:
    """Each arm's actions in two episodes, rows of several arms side by side."""
    done = run_rollouts(tiny("smolvla"), toy_suite(), 2, 5, ["walk"], arms, folder, OPTIONS)
    steps = read_steps(folder).to_pandas().merge(done.episodes.to_pandas()[["episode", "arm"]], on="episode")
    return {str(arm): np.stack(list(part["action"])) for arm, part in steps.groupby("arm")}


def test_a_donor_of_everything_that_the_instruction_says_is_another_instruction(tmp_path: Path) -> None:
    width = tiny("smolvla").hook_points[LATER].shape[-1]
    assert isinstance(width, int)
    own = {"walk": "go walk"}
    found = actions_of(
        tmp_path,
        [
            BASELINE, ToldArm("told", [Told(DONORS["walk"])]), donor("whole"), donor("own", LATER, own),
            donor("later", LATER), donor("every", LATER, subspace=random_subspace(width, width, 0)),
            donor("one", LATER, subspace=random_subspace(width, 1, 0)), donor("none", strength=0.0),
        ],
    )  # fmt: skip
    n = min(map(len, found.values()))
    assert np.allclose(found["whole"][:n], found["told"][:n], atol=1e-4)
    for same in ("own", "none"):
        assert np.allclose(found[same][:n], found["baseline"][:n], atol=1e-4)
    assert np.allclose(found["every"][:n], found["later"][:n], atol=1e-4)
    moved = {arm: np.abs(each[:n] - found["baseline"][:n]).max() for arm, each in found.items()}
    assert moved["told"] > 0.01 and moved["later"] > 0.01 and 0 < moved["one"] < moved["later"]


def test_donors_describe_themselves_and_travel() -> None:
    cloudpickle = pytest.importorskip("cloudpickle", reason="arms travel to workers by cloudpickle, of the ray extra")
    width = tiny("smolvla").hook_points[LATER].shape[-1]
    assert isinstance(width, int)
    arms = [donor("a", LATER, subspace=random_subspace(width, 2, seed)) for seed in (0, 1)]
    assert all(isinstance(arm, Arm) and isinstance(arm, ObservingArm) for arm in arms)
    first, second = (describe_arms([arm])["a"] for arm in arms)
    assert first["subspace"]["k"] == 2 and first != second
    back = cloudpickle.loads(cloudpickle.dumps(arms[0]))
    assert describe_arms([back])["a"] == first and isinstance(back.twin, HookedVLA)


def test_twins_share_weights_and_not_hooks() -> None:
    model = tiny("smolvla")
    twin = twin_of(model)
    assert all(
        a is b or a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    with model.hooks([(EMBED, lambda value, hook: value * 0)]):
        assert not twin.points[EMBED].listeners


def test_wrong_donors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert.hook_tokens runs at every denoise step"):
        donor("a", "expert.hook_tokens")
    longer = donor("a", LATER, {"walk": "go a long way home"})
    with pytest.raises(ValueError, match="arm 'a': the donors have .* tokens of language at vlm.blocks.0"):
        actions_of(tmp_path / "x", [BASELINE, longer])
    with pytest.raises(RuntimeError, match="was last observed at step None, not 0"):
        donor("a").donated([Cell(0, "a", "walk", 5)], 0)
