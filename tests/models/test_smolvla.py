"""SmolVLA against the public implementation's recorded values, and what its wiring implies."""

import re
from dataclasses import replace

import pytest
import torch
from public_checkpoints import Golden, make_observation
from tolerance import ATOL, assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.inputs import Segments

_LEAVES = {
    "q_proj": "hook_q", "k_proj": "hook_k", "v_proj": "hook_v", "o_proj": "hook_attn_out", "out_proj": "hook_attn_out",
    "down_proj": "hook_mlp_out", "fc2": "hook_mlp_out",
}  # fmt: skip
_WHOLE = {
    "model.state_proj": "vlm.hook_embed_state",
    "model.action_time_mlp_out": "expert.hook_tokens",
    "model.action_out_proj": "expert.hook_velocity",
    "model.vlm_with_expert.vlm.model.connector.modality_projection.proj": "connector.hook_out",
    "model.vlm_with_expert.vlm.model.vision_model.post_layernorm": "vision.ln_final.hook_normalized",
}
_STACKS = {"vision_model.encoder": "vision", "text_model": "vlm", "lm_expert": "expert"}


def hook_of(module: str, model: HookedVLA) -> str:
    """The hook point that holds what a module of the public implementation returns."""
    if module in _WHOLE:
        return _WHOLE[module]
    match = re.fullmatch(r".*\.(vision_model\.encoder|text_model|lm_expert)\.layers\.(\d+)\.\w+\.(\w+)", module)
    assert match is not None, module
    block, leaf = f"{_STACKS[match.group(1)]}.blocks.{match.group(2)}", _LEAVES[match.group(3)]
    candidates = [f"{block}.{leaf}", f"{block}.attn.{leaf}", f"{block}.cross_attn.{leaf}"]
    return next(name for name in candidates if name in model.points)


def as_recorded(value: Tensor, recorded: Tensor, hook: str, n_cameras: int) -> Tensor:
    """Our tensor in the recording's layout: heads merged, and one call a denoise step, camera or pass."""
    if "attn.hook_" in hook:
        value = value.flatten(-2)
    if hook.startswith(("vision", "connector")):
        value = value.unflatten(0, (-1, n_cameras)).transpose(0, 1)
    elif hook.startswith("vlm"):
        value = value.squeeze(1)[None] if hook.endswith("state") else value[None]
    # large recordings keep the first calls and rows only
    return value[: recorded.shape[0], : recorded.shape[1]]


def test_actions_equal_the_public_implementation(golden: Golden, golden_model: HookedVLA) -> None:
    assert_close(golden_model.predict_action_chunk(golden.batch, noise=golden.noise), golden.actions)
    assert_close(golden_model.predict_action_chunk(golden.batch, noise=[golden.noise]), golden.actions)


@torch.no_grad()
def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, golden_model: HookedVLA) -> None:
    _, cache = golden_model.run_with_cache(golden.batch, noise=golden.noise)
    modules = [key for key in golden.recorded if key.startswith("ref.")]
    assert len(modules) > 50
    for module in modules:
        recorded = golden.recorded[module]
        hook = hook_of(module.removeprefix("ref."), golden_model)
        ours = as_recorded(cache[hook], recorded, hook, n_cameras=2)
        assert ours.shape == recorded.shape, (module, hook, ours.shape)
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda text, m=module: f"{m}: {text}")


def test_bfloat16_stays_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    assert model.net.vlm.embed.weight.dtype == torch.bfloat16
    assert model.net.expert.action_out_proj.weight.dtype == torch.float32
    actions = model.predict_action_chunk(golden.batch, noise=golden.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


def test_published_size_has_the_published_parameters() -> None:
    spec = registry.get_spec("smolvla")
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 450_046_176


def test_padding_does_not_reach_the_actions(golden: Golden, golden_model: HookedVLA) -> None:
    tokens = golden.batch["observation.language.tokens"].clone()
    mask = golden.batch["observation.language.attention_mask"]
    assert not mask.all()
    changed = golden.batch | {"observation.language.tokens": tokens.masked_fill(~mask, 5)}
    before = golden_model.predict_action_chunk(golden.batch, noise=golden.noise)
    assert torch.equal(golden_model.predict_action_chunk(changed, noise=golden.noise), before)
    longer = golden.batch | {
        "observation.language.tokens": torch.nn.functional.pad(tokens, (0, 5)),
        "observation.language.attention_mask": torch.nn.functional.pad(mask, (0, 5)),
    }
    assert_close(golden_model.predict_action_chunk(longer, noise=golden.noise), before)


def test_a_hidden_camera_does_not_reach_the_actions(tiny_model: HookedVLA, noise: Tensor) -> None:
    first, second = make_observation(seed=0), make_observation(seed=1)
    hidden = {"wrist": torch.zeros(2, dtype=torch.bool)}
    a = replace(first, image_masks=hidden)
    b = replace(first, images={"agent": first.images["agent"], "wrist": second.images["wrist"]}, image_masks=hidden)
    assert torch.equal(tiny_model.predict_action_chunk(a, noise), tiny_model.predict_action_chunk(b, noise))
    shown = replace(b, image_masks=None)
    assert not torch.equal(tiny_model.predict_action_chunk(a, noise), tiny_model.predict_action_chunk(shown, noise))


@torch.no_grad()
def test_cached_prefix_equals_recomputing_it_every_step(golden: Golden, golden_model: HookedVLA) -> None:
    net, inputs = golden_model.net, golden_model.prepare(golden.batch)
    x, dt = golden.noise, -1.0 / net.n_denoise_steps
    for step in range(net.n_denoise_steps):
        time = torch.full((2,), 1.0 + step * dt)
        x = x + dt * net.expert(x, time, net.prefill(inputs))[1]
    assert torch.equal(x[..., :6], golden_model.predict_action_chunk(golden.batch, noise=golden.noise))


@torch.no_grad()
def test_batch_rows_are_independent(tiny_model: HookedVLA, noise: Tensor) -> None:
    inputs = tiny_model.prepare(make_observation())
    both = tiny_model.sample_actions(inputs, noise)
    for row in range(2):
        alone = tiny_model.sample_actions(inputs.rows([row]), noise[row : row + 1])
        assert_close(alone, both[row : row + 1])


@torch.no_grad()
def test_patching_all_inputs_of_a_layer_reproduces_the_source(tiny_model: HookedVLA, noise: Tensor) -> None:
    """The expert's inputs at a layer are its residual stream and every layer's keys and values from there on."""
    a, b = make_observation(seed=0), make_observation(seed=1)
    wanted = ["expert.blocks.1.hook_resid_pre", "expert.blocks.*.hook_prefix_[kv]", "expert.hook_noisy_actions"]
    expected, cache = tiny_model.run_with_cache(b, wanted, noise=noise)

    def from_b(value: Tensor, hook) -> Tensor:
        return cache[hook.name][hook.denoise_step]

    patched = tiny_model.run_with_hooks(a, [(wanted, from_b)], noise=noise)
    assert expected is not None
    assert torch.equal(patched.chunk, expected.chunk)
    assert not torch.equal(tiny_model(a, noise).chunk, expected.chunk)


@torch.no_grad()
def test_last_residual_through_the_head_is_the_actions(golden: Golden, golden_model: HookedVLA) -> None:
    expert = golden_model.net.expert
    _, cache = golden_model.run_with_cache(golden.batch, noise=golden.noise)
    last = cache[f"expert.blocks.{len(expert.blocks) - 1}.hook_resid_post"]
    x = golden.noise
    for step in range(golden_model.n_denoise_steps):
        assert_close(cache["expert.hook_noisy_actions"][step], x)
        velocity = expert.action_out_proj(expert.ln_final(last[step]))
        x = x - velocity / golden_model.n_denoise_steps
    assert_close(cache["head.hook_actions"], x)
    assert_close(cache["head.hook_actions"][..., :6], golden.actions)


def test_expert_is_causal_over_its_own_actions(tiny_model: HookedVLA, noise: Tensor) -> None:
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(make_observation(), "expert.blocks.0.attn.hook_pattern", noise=noise)
    pattern = cache["expert.blocks.0.attn.hook_pattern"].segment("action", axis="key")
    assert (pattern.triu(1) == 0).all()
    assert (pattern.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_segments_cover_every_token_once_per_row(tiny_model: HookedVLA, observation: Observation) -> None:
    segments: Segments = tiny_model.segments(tiny_model.prepare(observation))["vlm"]
    assert segments.present() == ["image:agent", "image:wrist", "language", "state", "pad"]
    lengths = {name: segments.mask(name).sum(1).tolist() for name in segments.names}
    assert lengths["image:agent"] == lengths["image:wrist"] == [4, 4]
    assert lengths["language"] == [len("put the red block on the tray\n"), len("lift\n")]
    assert lengths["state"] == [1, 1]
    assert torch.stack([segments.mask(name) for name in segments.names]).sum(0).eq(1).all()
    assert [name for name, _, _ in segments.spans(row=1)] == ["image:agent", "image:wrist", "language", "pad", "state"]


def test_select_action_works_through_the_chunk(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    chunk = tiny_model.predict_action_chunk(observation, noise)
    n = tiny_model.spec.features.n_action_steps
    actions = [tiny_model.select_action(observation, noise) for _ in range(n)]
    assert torch.equal(torch.stack(actions, 1), chunk[:, :n])
    tiny_model.select_action(observation, noise)
    tiny_model.reset()
    assert torch.equal(tiny_model.select_action(observation, noise), chunk[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_and_columns_of_patterns_sum_as_they_should(dtype: torch.dtype, golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=dtype)
    _, cache = model.run_with_cache(golden.batch, "*.hook_pattern", noise=golden.noise)
    assert len(cache) == 2 + 4 + 4
    for name in cache:
        sums = cache[name].float().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=ATOL[dtype], msg=name)
