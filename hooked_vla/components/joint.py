"""Attention of an action expert to the cached keys and values of a prefix that another stream computed once."""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from hooked_vla.components.attention import Attention, KeysValues, RotarySelfAttention
from hooked_vla.components.rope import Rotation, rotate
from hooked_vla.hooks.point import HookPoint


class PrefixLayer:
    """One layer's cached keys and values, and what an expert layer has derived from them in this chunk.

    n: how many batches in a row the expert runs on the prefix of one.
    """

    def __init__(self, kv: KeysValues, n: int = 1) -> None:
        self.kv, self.n = kv, n
        self.k, self.v = self.repeated(kv)
        self._projected: KeysValues | None = None

    def repeat(self, n: int) -> "PrefixLayer":
        """The same prefix for n batches in a row."""
        return PrefixLayer(self.kv, n * self.n)

    def repeated(self, kv: KeysValues) -> KeysValues:
        return kv if self.n == 1 else KeysValues(*(repeat(each, "b ... -> (n b) ...", n=self.n) for each in kv))

    def projected(self, project: Callable[[Tensor, Tensor], KeysValues]) -> KeysValues:
        """What `project` makes of the keys and values: once per chunk, and once for all batches."""
        if self._projected is None:
            self._projected = self.repeated(project(*self.kv))
        return self._projected


class JointAttention(RotarySelfAttention):
    """Queries of the expert attend to the prefix and to the expert's own tokens, in one softmax."""

    axis_streams = {"key": "vlm+expert", "prefix": "vlm"}

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.hook_prefix_k = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)
        self.hook_prefix_v = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        prefix: PrefixLayer,
        by: Rotation,
        mask: Float[Tensor, "batch 1 seq key"],
    ) -> Float[Tensor, "batch seq d_model"]:
        q, own = self.rotated(x, by)
        k = torch.cat([self.hook_prefix_k(prefix.k), own.k], dim=1)
        v = torch.cat([self.hook_prefix_v(prefix.v), own.v], dim=1)
        return self.attend(q, k, v, mask)


class CrossAttention(Attention):
    """Queries of the expert attend to keys and values projected anew from the prefix's, all heads at once.

    The projected keys are not rotated again; the prefix keys already are.
    """

    axis_streams = {"key": "vlm", "prefix": "vlm"}

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, n_prefix_heads: int, bias: bool
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, n_prefix_heads * d_head, bias)
        self.n_prefix_heads = n_prefix_heads
        self.hook_prefix_k = HookPoint("batch prefix n_prefix_heads d_head", per_chunk=True)
        self.hook_prefix_v = HookPoint("batch prefix n_prefix_heads d_head", per_chunk=True)
        self.hook_k = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)
        self.hook_v = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)
        self.hook_rot_q = HookPoint("batch seq n_heads d_head")

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        prefix: PrefixLayer,
        by: Rotation,
        mask: Float[Tensor, "batch 1 seq key"],
    ) -> Float[Tensor, "batch seq d_model"]:
        q = self.hook_rot_q(rotate(self.queries(x), by))
        prefix_k, prefix_v = self.hook_prefix_k(prefix.k), self.hook_prefix_v(prefix.v)
        if prefix_k is not prefix.k or prefix_v is not prefix.v:
            k, v = self._project(prefix_k, prefix_v)
        else:
            # the prefix does not depend on the denoise step
            k, v = prefix.projected(self._project)
        return self.attend(q, self.hook_k(k), self.hook_v(v), mask)

    def _project(self, k: Tensor, v: Tensor) -> KeysValues:
        k = self.k_proj(rearrange(k, "b s h d -> b s (h d)"))
        v = self.v_proj(rearrange(v, "b s h d -> b s (h d)"))
        return KeysValues(self.split_kv(k), self.split_kv(v))
