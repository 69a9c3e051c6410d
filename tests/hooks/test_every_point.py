"""For every hook point of every model: it fires as declared, editing it matters, and the identities hold."""

import fnmatch
from functools import partial

import pytest
import torch
from public_checkpoints import read_golden
from tolerance import assert_close
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, list_models
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions.places import ROW_AXES

MODELS = list_models()
DTYPES = [torch.float32, torch.bfloat16]
# points edited in one pass
ROWS = 8
FILTERS = (["*.hook_resid_*"], ["expert.*"], ["*.hook_prefix_k"], ["vlm.blocks.0.*", "*.hook_pattern"])


CASES = [(m, d) for m in MODELS for d in DTYPES]


def case_id(case) -> str:
    return f"{case[0]}-{case[1]}"


@pytest.fixture(scope="module", params=CASES, ids=case_id)
def case(request):
    name, dtype = request.param
    golden = read_golden(name)
    model = HookedVLA.from_pretrained(golden.folder, dtype=dtype).requires_grad_(False)
    actions, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    return model, golden, dtype, actions, cache


def test_every_point_fires_with_its_declared_shape_and_dtype(case) -> None:
    model, golden, _, _, cache = case
    inputs = model.prepare(golden.batch)
    sizes = {"batch": inputs.batch_size}
    if "vision" in (segments := model.segments(inputs)):
        sizes["image"] = len(segments["vision"].labels)
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
    for names_filter in FILTERS:
        # not every model has prefix keys, say
        if not all(fnmatch.filter(model.points, glob) for glob in names_filter):
            continue
        actions, some = model.run_with_cache(golden.batch, names_filter, noise=golden.noise)
        assert model.cache_size(golden.batch, names_filter) == some.nbytes, names_filter


def side_by_side(model: HookedVLA) -> list[dict[str, int | None]]:
    """The points of each pass, and in which row each is edited: None, in a pass of its own, where all rows share it."""
    shared = [{name: None} for name, site in model.hook_points.items() if site.axes[0] not in ROW_AXES]
    apart = [name for name, site in model.hook_points.items() if site.axes[0] in ROW_AXES]
    return shared + [{name: row for row, name in enumerate(apart[i : i + ROWS])} for i in range(0, len(apart), ROWS)]


def edited(value: Tensor, hook, row: int | None) -> Tensor:
    """Other elements of the same kind, by about as much as they differ: all, or those of a row of the batch."""
    result = value.clone()
    own = result if row is None else result.unflatten(0, (ROWS, -1))[row]
    if value.is_floating_point():
        draws = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
        own += ((own.float().std(correction=0) + 0.1) * draws).to(value.dtype)
    else:
        own += 1
    return result


def slow_in_16_bits(case):
    """What reaches the actions does not depend on the dtype."""
    return pytest.param(case, id=case_id(case), marks=[] if case[1] is torch.float32 else pytest.mark.slow)


@pytest.mark.parametrize("case", [slow_in_16_bits(each) for each in CASES], indirect=True)
@unchecked_shapes()
def test_editing_a_point_changes_the_actions_unless_it_is_a_dead_end(case) -> None:
    """Each point in a row of its own."""
    model, golden, dtype, *_ = case
    # tokens change by jumps only: where actions are tokens, a change of their scores counts too
    scores = fnmatch.filter(model.points, "*.hook_logits")
    inputs = model.prepare(golden.batch).rows([0] * ROWS)
    # recorded options leave nothing to decide: there the model draws them itself, always from one seed
    draws = [golden.noise] if isinstance(golden.noise, Tensor) else golden.noise
    noise = [draw[:1].expand(ROWS, *draw.shape[1:]) for draw in draws]
    noise = noise if all(draw.is_floating_point() for draw in noise) else None

    def outcome(edits) -> Tensor:
        torch.manual_seed(0)
        with model.hooks(edits):
            actions, cache = model.run_with_cache(inputs, scores, noise=noise)
        found = [actions.chunk, *(cache[name].movedim(int(model.hook_points[name].denoised), 0) for name in scores)]
        return torch.cat([each.float().flatten(1) for each in found], dim=1)

    before = outcome([])
    rounding = 8 * torch.finfo(dtype).eps * before.abs().amax(dim=1)
    wrong = []
    for places in side_by_side(model):
        edits = [(name, partial(edited, row=row)) for name, row in places.items()]
        moved = (outcome(edits) - before).abs().amax(dim=1)
        for name, row in places.items():
            change, limit = moved[row or 0], rounding[row or 0]
            # what a dead end changes may cancel exactly in arithmetic, and only up to rounding in floating point
            if change == 0 if model.hook_points[name].reaches_action else change > limit:
                wrong.append(name)
    assert not wrong


def test_residual_stream_identities(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if name.endswith("hook_resid_mid"):
            block = name.rpartition(".")[0]
            # post-norm blocks show each sum before its norm; decoder blocks have cross-attention in the middle; what a
            # convolution adds comes before attention and the MLP
            sums = [("hook_resid_pre", ["hook_conv1_out", "hook_attn_out"], ["hook_pre_ln1", "hook_resid_mid"])]
            last = "hook_resid_mid"
            if f"{block}.hook_cross_attn_out" in model.points:
                last = "hook_resid_mid_cross"
                sums.append(("hook_resid_mid", ["hook_cross_attn_out"], ["hook_pre_ln_cross", last]))
            written = ["hook_conv2_out", "hook_mlp_out", "hook_deepstack"]
            sums.append((last, written, ["hook_pre_ln2", "hook_resid_post"]))
            for stream, added, totals in sums:
                value = cache[f"{block}.{stream}"]
                for each in added:
                    value = value + cache[f"{block}.{each}"] if f"{block}.{each}" in model.points else value
                total = next(each for each in totals if f"{block}.{each}" in model.points)
                assert torch.equal(value, cache[f"{block}.{total}"]), (block, total)


def test_pattern_times_values_is_z(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if not name.endswith("hook_pattern"):
            continue
        attn = name.rpartition(".")[0]
        values = cache[f"{attn}.hook_v"]
        if hook_names.pathway(name) == "decode":
            # every step's keys are all tokens that may come, of which the pattern is 0 for those to come
            values = values.squeeze(-3).movedim(0, -3).expand(len(values), *[-1] * (values.ndim - 1))
        prefix = f"{attn}.hook_prefix_v"
        if prefix in cache and f"{attn}.hook_rot_k" in model.points:
            values = torch.cat([cache[prefix], values], dim=-3)
        pattern = cache[name]
        values = values.repeat_interleave(pattern.shape[-3] // values.shape[-2], dim=-2)
        # attention between channels mixes the channels of a head, token by token
        mix = "...hqk,...shk->...shq" if ".channel." in name else "...hqk,...khd->...qhd"
        z = torch.einsum(mix, pattern, values)
        assert_close(cache[f"{attn}.hook_z"], z, dtype)


def test_scores_after_softmax_are_the_pattern(case) -> None:
    model, _, dtype, _, cache = case
    for name in model.hook_points:
        if name.endswith("hook_pattern"):
            scores = cache[name.replace("hook_pattern", "hook_attn_scores")]
            # a query that sees nothing at all has scores of minus infinity, and reads nothing
            pattern = scores.softmax(-1).masked_fill(scores == -torch.inf, 0)
            assert_close(pattern, cache[name], dtype)


def test_identity_hooks_change_no_bit(case) -> None:
    model, golden, dtype, actions, cache = case
    in_the_open = [name for name in model.points if name.endswith(("hook_attn_scores", "hook_pattern", "hook_scale"))]
    plain = [name for name in model.points if name not in in_the_open]
    for identity in (lambda value, hook: None, lambda value, hook: value, lambda value, hook: value.clone()):
        after = model.run_with_hooks(golden.batch, [(plain, identity)], noise=golden.noise)
        # the fixture was run with scores and patterns cached: its actions are those of the explicit path
        again = model.run_with_hooks(golden.batch, [(list(model.points), identity)], noise=golden.noise)
        assert torch.equal(after.chunk, model(golden.batch, golden.noise).chunk)
        assert torch.equal(again.chunk, actions.chunk)
    # where actions are tokens they change by jumps only: the scores of the first one agree, as parts of the largest,
    # which makes them numbers of the actions' size
    if "vlm.hook_logits" in model.points:
        _, plain_cache = model.run_with_cache(golden.batch, "vlm.hook_logits", noise=golden.noise)
        plain_logits, logits = plain_cache["vlm.hook_logits"], cache["vlm.hook_logits"]
        assert_close(plain_logits / logits.abs().max(), logits / logits.abs().max(), dtype)
    else:
        assert_close(model(golden.batch, golden.noise).chunk, actions.chunk, dtype)
