"""Greedy generation, one token at a time after a prefix: the `decode` pathway of hooks/names.py.

Every step has the same shapes: the keys are the prefix's, then one slot for each token that may come, of which the
ones to come are masked. Building a decoder makes no new weights: its parameters are tied to the prefix model's.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.attention import KeysValues, RotarySelfAttention
from hooked_vla.components.rope import Rotation, rotation
from hooked_vla.hooks.point import HookPoint, Run


class CachedLayer:
    """One layer's keys and values: the prefix's, and those of the tokens decoded so far."""

    def __init__(self, prefix: KeysValues, n_slots: int) -> None:
        self.k, self.v = prefix
        self.n_slots = n_slots
        self._own: list[KeysValues] = []

    def add(self, kv: KeysValues) -> KeysValues:
        """Take in one more token; returns all slots, zero where no token came yet."""
        self._own.append(kv)
        n_empty = self.n_slots - len(self._own)
        # concatenated rather than written in place: gradients flow to earlier steps
        k, v = (torch.cat(part, dim=1) for part in zip(*self._own, strict=True))
        return KeysValues(functional.pad(k, (0, 0, 0, 0, 0, n_empty)), functional.pad(v, (0, 0, 0, 0, 0, n_empty)))


class CachedAttention(RotarySelfAttention):
    """The newest token attends to the prefix, to the tokens decoded before it, and to itself."""

    axis_streams = {"key": "vlm+decode.slots", "prefix": "vlm"}

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.hook_prefix_k = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)
        self.hook_prefix_v = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)

    def forward(
        self,
        x: Float[Tensor, "batch 1 d_model"],
        cache: CachedLayer,
        by: Rotation,
        mask: Float[Tensor, "batch 1 1 key"],
    ) -> Float[Tensor, "batch 1 d_model"]:
        q, own = self.rotated(x, by)
        slots = cache.add(own)
        k = torch.cat([self.hook_prefix_k(cache.k), slots.k], dim=1)
        v = torch.cat([self.hook_prefix_v(cache.v), slots.v], dim=1)
        return self.attend(q, k, v, mask)


class TokenDecoder(nn.Module):
    """Blocks around CachedAttention and a final norm, whose parameters the owner ties to those of its prefix model."""

    def __init__(
        self,
        d_model: int,
        d_head: int,
        rope_base: float,
        d_vocab: int,
        blocks: Iterable[nn.Module],
        ln_final: nn.Module,
    ) -> None:
        super().__init__()
        self.d_model, self.d_head, self.rope_base, self.d_vocab = d_model, d_head, rope_base, d_vocab
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = ln_final
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_logits = HookPoint("batch d_vocab")

    def forward(
        self,
        token: Float[Tensor, "batch 1 d_model"],
        step: int,
        valid: Bool[Tensor, "batch prefix"],
        caches: list[CachedLayer],
        unembed: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the token after the one embedded in `token`, which is the `step`-th after the prefix.

        unembed: a function or method; accelerate would move a module that is passed in, offloaded weights or not.
        """
        n_slots = caches[0].n_slots
        position = valid.long().sum(1, keepdim=True) + step
        by = rotation(position, self.d_head, self.rope_base)
        filled = torch.arange(n_slots, device=valid.device) <= step
        visible = torch.cat([valid, filled.expand(len(valid), -1)], dim=1)
        mask = masks.additive(visible[:, None], token.dtype)
        x = self.hook_tokens(token)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, by, mask)
        return self.hook_logits(unembed(self.ln_final(x)[:, -1]))


def generate_greedily(
    first: Float[Tensor, "batch d_vocab"],
    next_logits: Callable[[Int[Tensor, " batch"], int], Float[Tensor, "batch d_vocab"]],
    n_tokens: int,
    end_token: int | None,
    run: Run,
) -> Int[Tensor, "batch n_tokens"]:
    """The likeliest token at every step, starting from the prefix's logits `first`; keeps `run.denoise_step`.

    next_logits(token, step) reads the token just chosen. Stops early when every row has produced end_token (None:
    never); what was not generated is 0.
    """
    tokens = [first.argmax(-1)]
    ended = torch.zeros_like(tokens[0], dtype=torch.bool)
    for step in range(n_tokens - 1):
        if end_token is not None:
            ended = ended | (tokens[-1] == end_token)
            if bool(ended.all()):
                break
        run.denoise_step = step
        tokens.append(next_logits(tokens[-1], step).argmax(-1))
    run.denoise_step = None
    return functional.pad(torch.stack(tokens, dim=1), (0, n_tokens - len(tokens)))
