"""Shares of the residual stream's parts add up to what the expert predicts, in every family that has such an expert."""

import numpy as np
import pytest
import torch

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.direct import NOISE, attribute_actions, strengths

FLOW = "expert.hook_velocity"
SITES = {
    "smolvla": FLOW, "pi0": FLOW, "pi05": FLOW, "groot_n17": FLOW, "xvla": "expert.hook_clean_actions",
    "act": "head.hook_actions",
}  # fmt: skip


def _observation(model: HookedVLA, n: int = 2) -> Observation:
    features = model.processor.features
    rng = np.random.default_rng(0)
    cameras = features.cameras or ("agent",)
    images = {each: rng.integers(0, 256, (n, 48, 64, 3), dtype=np.uint8) for each in cameras}
    state = rng.standard_normal((n, features.d_state or 4)).astype(np.float32)
    return Observation(images, state, ["push", "lift it"][:n])


@pytest.mark.parametrize("name", SITES)
def test_shares_and_bias_are_the_whole_prediction(name):
    model = HookedVLA.from_spec(name, size="tiny", seed=0)
    found = attribute_actions(model, _observation(model))
    assert found.site == SITES[name] and found.prediction.ndim == 4
    assert found.error < 1e-5 * max(1.0, float(found.prediction.abs().max()))
    # not by one part alone
    assert len(found.labels) == len(found.contributions) >= 5
    assert (strengths(found).sum(-1) > 0).sum() >= 4
    if found.actions is not None:
        torch.testing.assert_close(found.actions.sum(0).float(), found.finished, rtol=1e-5, atol=1e-5)
        assert (NOISE in found.action_labels) == (found.site == FLOW)
    else:
        assert name == "xvla"
        with pytest.raises(ValueError, match=r"squashes the gripper channels \[9, 19\]"):
            found.action_labels  # noqa: B018


def test_biases_and_gains_that_are_not_trivial_are_accounted_for():
    """Norms and heads of random models start as identities: here every parameter is drawn."""
    for name in ("act", "groot_n17", "xvla", "pi05"):
        model = HookedVLA.from_spec(name, size="tiny", seed=0)
        generator = torch.Generator().manual_seed(1)
        for path, parameter in model.net.named_parameters():
            if path.startswith(("expert.ln_final", "expert.blocks", "expert.action", "head.")):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        found = attribute_actions(model, _observation(model))
        assert float(found.prediction.abs().max()) > 0.05
        assert found.error < 1e-5 * max(1.0, float(found.prediction.abs().max())), name
        assert float(found.contributions[-1].abs().max()) > 1e-3, "the bias is a part"


def test_a_part_that_is_taken_out_has_no_share(tiny_model, observation, noise):
    site = "expert.blocks.1.hook_mlp_out"
    with tiny_model.hooks([(site, lambda value, hook: torch.zeros_like(value))]):
        found = attribute_actions(tiny_model, observation, noise)
    assert (found.contributions[found.labels.index(site)] == 0).all() and found.error < 1e-5


def test_the_direct_share_is_the_effect_on_the_frozen_head(tiny_model, observation, noise):
    """Adding d to the last block's output moves the prediction by the linear map of d, divisors held."""
    last = "expert.blocks.3.hook_mlp_out"
    before = attribute_actions(tiny_model, observation, noise)
    at = before.labels.index(last)
    doubled: list[torch.Tensor] = []

    def hold(value, hook):
        doubled.append(value)
        return None

    with tiny_model.hooks([("expert.ln_final.hook_scale", hold)], at_steps=[0]):
        tiny_model(observation, noise)
    scale = doubled[0]
    with (
        torch.no_grad(),
        tiny_model.hooks(
            [(last, lambda value, hook: 2 * value), ("expert.ln_final.hook_scale", lambda value, hook: scale)],
            at_steps=[0],
        ),
    ):
        _, cache = tiny_model.run_with_cache(observation, FLOW, noise)
    moved = cache[FLOW][0] - before.prediction[0]
    torch.testing.assert_close(moved, before.contributions[at, 0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openvla", r"pathways \['connector', 'decode', 'head', 'vision', 'vlm'\]. Actions said as tokens"),
        ("diffusion", "transformer with a residual stream"),
        ("vqbet", "action head that is linear, or rectified once.*CodeHead"),
    ],
)
def test_other_models_are_refused_with_what_they_have(name, message):
    model = HookedVLA.from_spec(name, size="tiny", seed=0)
    with pytest.raises(ValueError, match=message):
        attribute_actions(model, _observation(model, 1))
