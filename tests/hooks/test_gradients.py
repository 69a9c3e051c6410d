"""Gradients: at every point and step the derivative with respect to that value there, and nothing else."""

import pytest
import torch
from public_checkpoints import make_observation
from torch import Tensor

from hooked_vla import HookedVLA, Observation

PER_CHUNK = ["expert.blocks.0.attn.hook_prefix_k", "expert.blocks.1.cross_attn.hook_prefix_v",
             "expert.blocks.1.cross_attn.hook_k"]  # fmt: skip
SITES = [*PER_CHUNK, "vlm.blocks.1.hook_resid_pre", "expert.blocks.2.hook_resid_post", "vlm.blocks.0.attn.hook_rot_k"]


def true_gradients(model: HookedVLA, obs: Observation, noise: Tensor, site: str) -> list[Tensor]:
    """By a leaf added to the value at each step: the definition, independent of backward hooks."""
    leaves = []

    def add_leaf(value: Tensor, hook) -> Tensor:
        leaves.append(torch.zeros_like(value, requires_grad=True))
        return value + leaves[-1]

    chunk = model.run_with_hooks(obs, [(site, add_leaf)], noise=noise).chunk
    return list(torch.autograd.grad(chunk.sum(), leaves))


@pytest.mark.parametrize("site", SITES)
def test_cached_and_hooked_gradients_are_the_true_ones_at_every_step(
    site: str, tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    expected, seen = true_gradients(tiny_model, observation, noise, site), {}
    cache = tiny_model.run_with_cache(observation, [site], noise=noise, incl_bwd=True)[1]
    stacked = cache[f"{site}_grad"] if len(expected) > 1 else cache[f"{site}_grad"][None]
    torch.testing.assert_close(stacked * 1, torch.stack(expected), rtol=1e-4, atol=1e-6)
    look = (site, lambda grad, hook: seen.update({hook.denoise_step: grad}))
    tiny_model.run_with_hooks(observation, bwd_hooks=[look], noise=noise).chunk.sum().backward()
    assert list(sorted(seen, key=lambda step: step or 0)) == (list(range(4)) if len(expected) > 1 else [None])
    for step, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[step or 0], rtol=1e-4, atol=1e-6)
    tiny_model.zero_grad()


def test_a_backward_hook_at_the_experts_view_leaves_the_vlms_own_path(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    """Zeroing the gradient at the expert's view of keys must not zero what reaches them through the vlm itself."""
    keys = tiny_model.net.vlm.blocks[0].attn.k_proj.weight
    norms = {}
    for name, steps in (("none", []), ("one", [1]), ("all", [0, 1, 2, 3])):
        tiny_model.zero_grad()
        hooks = [("expert.blocks.0.attn.hook_prefix_k", lambda grad, hook: grad * 0)] if steps else []
        actions = tiny_model.run_with_hooks(observation, bwd_hooks=hooks, noise=noise, at_steps=steps or None)
        actions.chunk.sum().backward()
        norms[name] = keys.grad.clone()
    assert norms["all"].abs().sum() > 0
    assert not torch.allclose(norms["all"], norms["one"]) and not torch.allclose(norms["one"], norms["none"])
    tiny_model.zero_grad()


def test_points_that_show_one_tensor_see_gradients_in_backward_order(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    """resid_pre of a block comes before the last block's resid_post on the way back."""
    seen = {}
    hooks = [
        ("vlm.blocks.0.hook_resid_post", lambda grad, hook: grad * 0),
        ("vlm.blocks.1.hook_resid_pre", lambda grad, hook: seen.update({hook.name: grad.abs().sum()})),
    ]
    tiny_model.run_with_hooks(observation, bwd_hooks=hooks, noise=noise).chunk.sum().backward()
    assert seen["vlm.blocks.1.hook_resid_pre"] > 0
    tiny_model.zero_grad()


def test_gradients_of_any_metric_from_the_cache(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    site = "vlm.blocks.1.hook_resid_pre"
    actions, cache = tiny_model.run_with_cache(observation, [site, "expert.hook_velocity"], noise=noise)
    assert actions is not None
    [expected] = true_gradients(tiny_model, observation, noise, site)
    for _ in range(2):
        gradients = cache.gradients(actions.chunk.sum())
        torch.testing.assert_close(gradients[site] * 1, expected, rtol=1e-4, atol=1e-6)
        assert gradients["expert.hook_velocity"].shape == cache["expert.hook_velocity"].shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in tiny_model.net.parameters())
    with torch.no_grad():
        flat, plain = tiny_model.run_with_cache(observation, [site], noise=noise)
    with pytest.raises(ValueError, match="depends on no cached tensor"):
        plain.gradients(flat.chunk.sum())


def test_incl_bwd_says_what_it_cannot_do(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    dead = "vlm.ln_final.hook_normalized"
    with pytest.raises(RuntimeError, match=f"no gradient reaches .*{dead}"):
        tiny_model.run_with_cache(observation, [dead], noise=noise, incl_bwd=True)
    with pytest.raises(ValueError, match="incl_bwd needs the whole run with gradients on"):
        tiny_model.run_with_cache(observation, noise=noise, incl_bwd=True, stop_at="vlm.blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match="gradients on"), torch.no_grad():
        tiny_model.run_with_cache(observation, noise=noise, incl_bwd=True)
    tiny_model.zero_grad()
    cache = tiny_model.run_with_cache(make_observation(), "*.hook_resid_post", noise=noise, incl_bwd=True)[1]
    assert "vlm.blocks.2.hook_resid_post_grad" in cache and "vlm.blocks.3.hook_resid_post_grad" not in cache
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in tiny_model.net.parameters())
