"""Shared models and inputs: the recorded public checkpoint, and a small random model with raw observations."""

from collections.abc import Iterator

import pytest
import torch
from public_checkpoints import Golden, make_observation, read_golden
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, Observation


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # shared cores: small operations stall when they wait for a second thread
    torch.set_num_threads(1)


@pytest.fixture(scope="module", name="unchecked_shapes")
def _unchecked_shapes() -> Iterator[None]:
    """A module without runtime shape checks: other tests have them on for the same code."""
    with unchecked_shapes():
        yield


@pytest.fixture(scope="session")
def golden() -> Golden:
    return read_golden("smolvla")


@pytest.fixture(scope="session")
def _golden_model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder)


@pytest.fixture
def golden_model(_golden_model: HookedVLA) -> HookedVLA:
    _golden_model.reset_hooks(including_permanent=True)
    _golden_model.reset()
    return _golden_model


@pytest.fixture(scope="session")
def _tiny_model() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", size="tiny", seed=0)


@pytest.fixture
def tiny_model(_tiny_model: HookedVLA) -> HookedVLA:
    _tiny_model.reset_hooks(including_permanent=True)
    _tiny_model.reset()
    return _tiny_model


@pytest.fixture
def observation() -> Observation:
    return make_observation()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
