"""For every hook point of every model: it fires as declared, editing it matters, and the identities hold."""

import pytest
import torch
from conftest import read_golden
from tolerance import assert_close

from hooked_vla import HookedVLA, list_models
from hooked_vla.hooks import names as hook_names

MODELS = list_models()
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=[(m, d) for m in MODELS for d in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    name, dtype = request.param
    golden = read_golden(name)
    model = HookedVLA.from_pretrained(golden.folder, dtype=dtype).requires_grad_(False)
    actions, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    return model, golden, dtype, actions, cache


def test_every_point_fires_with_its_declared_shape_and_dtype(case) -> None:
    model, _, _, _, cache = case
    sizes = {"batch": 2, "image": 4}
    for name, site in model.hook_points.items():
        value = cache[name]
        shape = value.shape[1:] if site.denoised else value.shape
        assert not site.denoised or value.shape[0] == model.n_denoise_steps, name
        assert value.dtype == site.dtype, (name, value.dtype, site.dtype)
        assert len(shape) == len(site.shape) == len(site.axes), name
        for axis, declared, actual in zip(site.axes, site.shape, shape, strict=True):
            assert declared == actual if isinstance(declared, int) else sizes.get(axis, actual) == actual, (name, axis)


def test_every_name_is_in_the_vocabulary_and_none_is_missing(case) -> None:
    model = case[0]
    used = {hook_names.leaf(name) for name in model.hook_points}
    assert all(hook_names.meaning(name) for name in model.hook_points)
    assert used <= set(hook_names.LEAVES)


def test_cache_holds_each_tensor_once_and_as_much_as_estimated(case) -> None:
    model, golden, dtype, _, cache = case
    assert set(cache.aliases) | set(cache) == set(model.hook_points)
    pointers = [cache[name].data_ptr() for name in cache if not model.points[name].per_chunk]
    assert len(pointers) == len(set(pointers))
    assert model.cache_size(golden.batch) == cache.nbytes
    for names_filter in ("*.hook_resid_*", "expert.*", "*.hook_prefix_k", ["vlm.blocks.0.*", "*.hook_pattern"]):
        actions, some = model.run_with_cache(golden.batch, names_filter, noise=golden.noise)
        assert model.cache_size(golden.batch, names_filter) == some.nbytes, names_filter


def test_editing_a_point_changes_the_actions_unless_it_is_a_dead_end(case) -> None:
    model, golden, *_ = case
    before = model(golden.batch, golden.noise)
    wrong = []
    for name, site in model.hook_points.items():
        generator = torch.Generator().manual_seed(0)

        def edit(value, hook, generator=generator):
            spread = value.float().std() + 0.1
            return value + (spread * torch.randn(value.shape, generator=generator)).to(value.dtype)

        after = model.run_with_hooks(golden.batch, [(name, edit)], noise=golden.noise)
        if torch.equal(after.chunk, before.chunk) == site.reaches_action:
            wrong.append(name)
    assert not wrong


def test_residual_stream_identities(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if name.endswith("hook_resid_mid"):
            block = name.rpartition(".")[0]
            pre, mid, post = (cache[f"{block}.hook_resid_{at}"] for at in ("pre", "mid", "post"))
            assert torch.equal(pre + cache[f"{block}.hook_attn_out"], mid), block
            assert torch.equal(mid + cache[f"{block}.hook_mlp_out"], post), block


def test_pattern_times_values_is_z(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if not name.endswith("hook_pattern"):
            continue
        attn = name.rpartition(".")[0]
        values = cache[f"{attn}.hook_v"]
        prefix = f"{attn}.hook_prefix_v"
        if prefix in cache and f"{attn}.hook_rot_k" in model.points:
            values = torch.cat([cache[prefix], values], dim=-3)
        pattern = cache[name]
        values = values.repeat_interleave(pattern.shape[-3] // values.shape[-2], dim=-2)
        z = torch.einsum("...hqk,...khd->...qhd", pattern, values)
        assert_close(cache[f"{attn}.hook_z"], z, dtype)


def test_scores_after_softmax_are_the_pattern(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if name.endswith("hook_pattern"):
            scores = cache[name.replace("hook_pattern", "hook_attn_scores")]
            assert_close(scores.softmax(-1), cache[name], dtype)


def test_identity_hooks_change_no_bit(case) -> None:
    model, golden, dtype, actions, _ = case
    in_the_open = [name for name in model.points if name.endswith(("hook_attn_scores", "hook_pattern", "hook_scale"))]
    plain = [name for name in model.points if name not in in_the_open]
    for identity in (lambda value, hook: None, lambda value, hook: value, lambda value, hook: value.clone()):
        after = model.run_with_hooks(golden.batch, [(plain, identity)], noise=golden.noise)
        # the fixture was run with scores and patterns cached: its actions are those of the explicit path
        again = model.run_with_hooks(golden.batch, [(list(model.points), identity)], noise=golden.noise)
        assert torch.equal(after.chunk, model(golden.batch, golden.noise).chunk)
        assert torch.equal(again.chunk, actions.chunk)
    assert_close(model(golden.batch, golden.noise).chunk, actions.chunk, dtype)
