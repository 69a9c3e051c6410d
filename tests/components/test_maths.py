"""Components by their defining properties."""

import math
import sys
from types import ModuleType

import pytest
import torch
from tolerance import assert_close

from hooked_vla.components import attention as attention_module
from hooked_vla.components.action_head import FlowMatchingHead
from hooked_vla.components.attention import Attention, RotarySelfAttention, SelfAttention
from hooked_vla.components.connector import PixelShuffleConnector
from hooked_vla.components.embed import PositionTable, sincos_time
from hooked_vla.components.joint import CrossAttention, JointAttention, PrefixLayer
from hooked_vla.components.mask import additive, block_mask, positions
from hooked_vla.components.mlp import MLP, GatedMLP, activation
from hooked_vla.components.norm import LayerNorm, RMSNorm
from hooked_vla.components.rope import rotate, rotation
from hooked_vla.hooks.point import CAPTURE, Listener, Run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rope_preserves_relative_position_and_length() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        at = [rotation(torch.tensor([[n]]), 16, 10_000.0) for n in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)
    turned = rotate(q, rotation(torch.tensor([[7]]), 16, 10_000.0))
    assert_close(turned.norm(), q.norm())
    assert torch.equal(rotate(q, rotation(torch.tensor([[0]]), 16, 10_000.0)), q)


def test_rope_turns_halves_together_by_the_documented_angle() -> None:
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    turned = rotate(x, rotation(torch.tensor([[5]]), 8, 100.0))[0, 0, 0]
    angle = 5 / 100 ** (2 / 8)
    assert turned[1] == pytest.approx(math.cos(angle), abs=1e-6)
    assert turned[5] == pytest.approx(math.sin(angle), abs=1e-6)


def test_block_mask_draws_what_its_docstring_draws() -> None:
    valid = torch.tensor([[True, True, True, True, True], [True, False, True, True, True]])
    mask = block_mask(valid, torch.tensor([0, 0, 0, 1, 1], dtype=torch.bool))
    assert mask[0].int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert not mask[1, 1].any() and not mask[1, :, 1].any()
    assert positions(valid).tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]


def test_a_row_that_sees_nothing_attends_evenly() -> None:
    mask = additive(torch.zeros(1, 1, 4, dtype=torch.bool), torch.float32)
    assert_close((torch.randn(1, 1, 1, 4) + mask).softmax(-1), torch.full((1, 1, 1, 4), 0.25))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_and_open_attention_agree(n_kv_heads: int, masked: bool) -> None:
    attn = Attention(24, 4, n_kv_heads, 6, 24, bias=False)
    q, k, v = torch.randn(2, 5, 4, 6), torch.randn(2, 7, n_kv_heads, 6), torch.randn(2, 7, n_kv_heads, 6)
    mask = additive(torch.rand(2, 5, 7) > 0.4, torch.float32) if masked else None
    fused, seen = attn.attend(q, k, v, mask), {}
    for point in (attn.hook_attn_scores, attn.hook_pattern):
        point.name = "vlm.hook"
        point.add(Listener(lambda value, hook: seen.update({len(seen): value}), CAPTURE))
    assert_close(attn.attend(q, k, v, mask), fused)
    assert seen[0].shape == seen[1].shape == (2, 4, 5, 7)
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(4 // n_kv_heads, 2)) / math.sqrt(6)
    assert_close(seen[0], expected if mask is None else expected + mask)


def test_attention_weights_have_transformerlens_shapes() -> None:
    attn = RotarySelfAttention(24, 4, 2, 6, bias=False)
    assert attn.W_Q.shape == (4, 24, 6) and attn.W_K.shape == attn.W_V.shape == (2, 24, 6)
    assert attn.W_O.shape == (4, 6, 24)
    x = torch.randn(1, 3, 24)
    assert_close(attn.queries(x), torch.einsum("bsm,hmd->bshd", x, attn.W_Q))
    z = torch.randn(1, 3, 4, 6)
    assert_close(attn.o_proj(z.flatten(-2)), torch.einsum("bshd,hdm->bsm", z, attn.W_O))
    mlp, gated = MLP(24, 40, "gelu"), GatedMLP(24, 40, "silu")
    assert_close(mlp(x), torch.nn.functional.gelu(x @ mlp.W_in + mlp.up_proj.bias) @ mlp.W_out + mlp.down_proj.bias)
    assert_close(gated(x), (torch.nn.functional.silu(x @ gated.W_gate) * (x @ gated.W_in)) @ gated.W_out)
    with pytest.raises(KeyError, match="unknown activation 'swish2'"):
        activation("swish2")


def test_flash_attention_is_called_with_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn takes [batch seq heads d_head] and grouped heads as they are; here a stand-in checks the call."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale):
        calls.append((q.shape, k.shape, softmax_scale))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=True)
        return z.transpose(1, 2)

    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func  # pyright: ignore
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: name == "flash_attn")
    attention_module._flash_attention.cache_clear()
    try:
        assert attention_module._flash_attention() is flash_attn_func
        attn = SelfAttention(24, 4, 2, 6, bias=True)
        x = torch.randn(2, 5, 24)
        expected = attn(x)
        assert not calls
        monkeypatch.setattr(attention_module, "flash_takes", lambda q, mask: mask is None)
        assert_close(attn(x), expected)
        assert calls == [((2, 5, 4, 6), (2, 5, 2, 6), 6**-0.5)]
    finally:
        attention_module._flash_attention.cache_clear()


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)])
def test_norms_equal_pytorchs_and_show_their_scale(ours, theirs) -> None:
    norm, reference = ours(12, 1e-6), theirs(12, eps=1e-6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    reference.load_state_dict(norm.state_dict())
    x, seen = torch.randn(2, 3, 12) * 5 + 1, []
    assert_close(norm(x), reference(x))
    norm.hook_scale.name = "vlm.hook_scale"
    norm.hook_scale.add(Listener(lambda value, hook: seen.append(value), CAPTURE))
    assert_close(norm(x), reference(x))
    spread = x.std(-1, correction=0, keepdim=True) if ours is LayerNorm else x.pow(2).mean(-1, keepdim=True).sqrt()
    assert_close(seen[0], spread)


def test_pixel_shuffle_puts_neighbouring_patches_into_one_token() -> None:
    connector = PixelShuffleConnector(d_vision=1, d_model=4, scale=2, bias=False)
    torch.nn.init.eye_(connector.proj.weight)
    tokens = connector(torch.arange(16.0).view(1, 16, 1))
    assert tokens[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert connector.n_tokens(16) == 4
    for wrong in (15, 9):
        with pytest.raises(ValueError, match="not a square whose side 2 divides"):
            connector.n_tokens(wrong)


def test_positions_of_other_image_sizes_take_the_cell_they_fall_in() -> None:
    table = PositionTable(4, 1)
    with torch.no_grad():
        table.weight.copy_(torch.arange(16.0)[:, None])
    assert table(4, 4).flatten().tolist() == list(range(16))
    assert table(2, 2).flatten().tolist() == [0, 2, 8, 10]
    assert table(8, 8).view(8, 8)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_time_embedding_has_the_documented_periods() -> None:
    embedded = sincos_time(torch.tensor([0.25]), 6, min_period=4e-3, max_period=4.0)[0]
    periods = [4e-3 * 1000 ** (i / 2) for i in range(3)]
    expected = [math.sin(2 * math.pi * 0.25 / p) for p in periods] + [math.cos(2 * math.pi * 0.25 / p) for p in periods]
    assert embedded.tolist() == pytest.approx(expected, abs=1e-5)


def test_euler_integrates_a_constant_velocity_exactly_and_counts_steps() -> None:
    run, steps = Run(), []
    head = FlowMatchingHead(n_steps=5, chunk=2, d_action=3)

    def denoise(x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append((run.denoise_step, round(float(time[0]), 6)))
        return x, torch.ones_like(x)

    noise = torch.randn(1, 2, 3)
    assert_close(head(noise, denoise, run), noise - 1)
    assert steps == [(0, 1.0), (1, 0.8), (2, 0.6), (3, 0.4), (4, 0.2)]
    assert run.denoise_step is None


def test_cross_attention_projects_the_prefix_once_unless_its_view_is_edited() -> None:
    attn = CrossAttention(24, 4, 2, 6, n_prefix_heads=3, bias=False)
    kv = attention_module.KeysValues(torch.randn(1, 5, 3, 6), torch.randn(1, 5, 3, 6))
    prefix, calls, project = PrefixLayer(kv), [], attn._project
    attn._project = lambda k, v: calls.append(1) or project(k, v)  # pyright: ignore
    x, mask = torch.randn(1, 2, 24), torch.zeros(1, 1, 2, 5)
    by = rotation(torch.tensor([[0, 1]]), 6, 100.0)
    first = attn(x, prefix, by, mask)
    assert torch.equal(attn(x, prefix, by, mask), first) and len(calls) == 1
    attn.hook_prefix_k.name = "expert.hook_prefix_k"
    attn.hook_prefix_k.add(Listener(lambda value, hook: value * 2))
    assert not torch.equal(attn(x, prefix, by, mask), first) and len(calls) == 2


def test_joint_attention_equals_attention_over_the_concatenation() -> None:
    attn = JointAttention(24, 4, 2, 6, bias=False)
    prefix = PrefixLayer(attention_module.KeysValues(torch.randn(1, 5, 2, 6), torch.randn(1, 5, 2, 6)))
    x, by = torch.randn(1, 3, 24), rotation(torch.tensor([[5, 6, 7]]), 6, 100.0)
    mask = additive(torch.rand(1, 3, 8) > 0.3, torch.float32)
    q, own = attn.rotated(x, by)
    expected = attn.attend(q, torch.cat([prefix.k, own.k], 1), torch.cat([prefix.v, own.v], 1), mask)
    assert torch.equal(attn(x, prefix, by, mask), expected)
