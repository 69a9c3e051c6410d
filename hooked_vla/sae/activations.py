"""What makes a code sparse: choices of features, and derivatives for what has none.

Codes with few features are held as (values, indices), [n k] each, and go through the sparse kernels: of the five
matrix products of a dense training step (encode, decode, and the gradients of both dictionaries and of the code) only
the encoder's is left.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional

from hooked_vla.kernels import sae_encode_topk, sparse_decode
from hooked_vla.kernels.sparse_backward import sparse_dots, sparse_outer

# batch_topk first looks at so many times k features of a token; the few with more active ones are looked at again
FIRST_LOOK = 3


class Code(NamedTuple):
    """Features of n tokens: values[t, j] of feature indices[t, j]; a value of 0 is none."""

    values: Float[Tensor, "n k"]
    indices: Int32[Tensor, "n k"]


@torch.no_grad()
def choose(
    x: Float[Tensor, "n d"], w_enc: Float[Tensor, "m d"], b_enc: Float[Tensor, " m"], k: int, relu: bool
) -> Code:
    """The k largest pre-activations of each token."""
    return Code(*sae_encode_topk(x, w_enc, b_enc, k, relu=relu, validate=False))


@torch.no_grad()
def choose_in_batch(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"],
    k: int,
    gather: Callable[[Tensor], Tensor],
) -> tuple[Code, Float[Tensor, ""]]:
    """(code, least): the n·k largest positive pre-activations of all tokens, and the least of them (infinite for none).

    gather: values of this process to those of all, along the first axis; all of them form the batch. Of equal values
    at the limit all are taken. Where fewer than n·k are positive, all of these are.
    """
    m = len(w_enc)
    width = min(m, FIRST_LOOK * k)
    values, indices = choose(x, w_enc, b_enc, width, relu=True)
    while True:
        everywhere = gather(values).flatten()
        wanted = len(everywhere) // values.shape[1] * k
        least = everywhere.kthvalue(len(everywhere) - wanted + 1).values
        # a token whose last value counts may have more of them
        cut_off = (values[:, -1] >= least) & (values[:, -1] > 0)
        if width == m or not bool(gather(cut_off.any()[None].int()).any()):
            break
        width = min(m, 2 * width)
        values, indices = (functional.pad(each, (0, width - each.shape[1])) for each in (values, indices))
        if bool(cut_off.any()):
            values[cut_off], indices[cut_off] = choose(x[cut_off].contiguous(), w_enc, b_enc, width, relu=True)
    values = torch.where(values >= least, values, 0)
    used = max(1, int((values > 0).sum(1).max()))
    active = torch.where((everywhere >= least) & (everywhere > 0), everywhere, torch.inf).min()
    return Code(values[:, :used].contiguous(), indices[:, :used].contiguous()), active


class _Chosen(torch.autograd.Function):
    """A code's values, which have gradients through the features that were chosen; the choice itself has none.

    x: what was encoded; offset: what had been taken off to make it, the same for all tokens, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor | None, w_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor,
        relu: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, w_enc, values, indices)
        ctx.relu = relu
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc, values, indices = ctx.saved_tensors
        grad = grads[0].contiguous()
        if ctx.relu:
            grad = torch.where(values > 0, grad, 0)
        d_x = sparse_decode(grad, indices, w_enc, None, validate=False) if ctx.needs_input_grad[0] else None
        d_w, d_b = sparse_outer(grad, indices, x, len(w_enc), dtype=w_enc.dtype, validate=False)
        # the sum over tokens of what each would pass on
        d_offset = -(d_b @ w_enc) if ctx.needs_input_grad[1] else None
        return d_x, d_offset, d_w, d_b, None, None, None


class _Decoded(torch.autograd.Function):
    """base + Σ_j values[t, j]·w_dec[indices[t, j]]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, w_dec)
        return sparse_decode(values, indices, w_dec, base, validate=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, w_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_values = sparse_dots(grad, indices, w_dec, validate=False) if ctx.needs_input_grad[0] else None
        d_w = None
        if ctx.needs_input_grad[2]:
            d_w, _ = sparse_outer(values, indices, grad, len(w_dec), dtype=w_dec.dtype, validate=False)
        return d_values, None, d_w, grad.sum(0) if ctx.needs_input_grad[3] else None


def chosen_values(
    x: Float[Tensor, "n d"], offset: Float[Tensor, " d"] | None, w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"], code: Code, relu: bool,
) -> Float[Tensor, "n k"]:  # fmt: skip
    """The code's values with gradients in x, w_enc, b_enc, and in offset, which was taken off to make x."""
    return _Chosen.apply(x, offset, w_enc, b_enc, *code, relu)  # pyright: ignore[reportReturnType]


def decoded(code: Code, w_dec: Float[Tensor, "m d"], base: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """base + Σ_j values[t, j]·w_dec[indices[t, j]], with gradients in the values, w_dec and base."""
    return _Decoded.apply(*code, w_dec, base)  # pyright: ignore[reportReturnType]


def spread(code: Code, m: int) -> Float[Tensor, "n m"]:
    """The code with all m features; differentiable in the values."""
    empty = code.values.new_zeros(len(code.values), m)
    # padding may name a feature twice, with 0
    return empty.scatter_add(1, code.indices.long(), code.values)


class _Step(torch.autograd.Function):
    """1 where z > threshold else 0; towards the threshold, its derivative is a rectangle `bandwidth` wide.

    arXiv 2407.14435, eq. 12.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        return None, -(grads[0] * near).flatten(0, -2).sum(0) / ctx.bandwidth, None


class _JumpReLU(torch.autograd.Function):
    """z where z > threshold else 0; towards the threshold as `_Step`, times it (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        d_threshold = -(threshold / ctx.bandwidth) * (grads[0] * near).flatten(0, -2).sum(0)
        return torch.where(z > threshold, grads[0], 0), d_threshold, None


def step(z: Float[Tensor, "n m"], threshold: Float[Tensor, " m"], bandwidth: float) -> Float[Tensor, "n m"]:
    """Whether a feature is on, with a gradient for its threshold."""
    return _Step.apply(z, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def jump_relu(z: Float[Tensor, "n m"], threshold: Float[Tensor, " m"], bandwidth: float) -> Float[Tensor, "n m"]:
    """z above the threshold, with gradients for both."""
    return _JumpReLU.apply(z, threshold, bandwidth)  # pyright: ignore[reportReturnType]
