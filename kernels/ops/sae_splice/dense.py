"""Encoder and decoder over the whole dictionary, for autoencoders whose number of active features is not fixed.

On a CPU the decoder still sums active rows alone: there, looking which they are costs nothing beside the product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hooked_vla.kernels.dispatch import implementation, without_autocast
from hooked_vla.kernels.sae_encode_topk import MAX_GROUP, cpu, reference

# of a code's entries, from which a product with all rows is faster than a bag of rows: sparse_decode's m / k
DENSE_FROM = 1 / 16


def _gated(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(z > threshold, z, 0)


def encode_in_torch(x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    """f = z where z > threshold, else 0: plain PyTorch, which defines it."""
    return _gated(reference.encode(x, w_enc, b_enc), threshold)


def encode_fused(x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    """z from the kernel, whose sums are float32 where a matrix product of PyTorch would round them before the gate."""
    from hooked_vla.kernels.sae_encode_topk.fused import encode_gmax

    z, _ = encode_gmax(x, w_enc, b_enc, MAX_GROUP)
    return _gated(z, threshold)


def encode_on_cpu(x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    return _gated(cpu.encode(x, w_enc, b_enc), threshold)


def decode_in_torch(f: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    """f·w_dec + b_dec: plain PyTorch, which defines it."""
    return (f @ w_dec.to(f.dtype) + b_dec).to(w_dec.dtype)


def decode_on_gpu(f: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    """PyTorch's product in w_dec's dtype, which sums in float32."""
    return (f.to(w_dec.dtype) @ w_dec + b_dec).to(w_dec.dtype)


def decode_on_cpu(f: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    tokens, columns = f.nonzero(as_tuple=True)
    if len(tokens) == 0 or len(tokens) > DENSE_FROM * f.numel():
        return decode_in_torch(f, w_dec, b_dec)
    counts = tokens.bincount(minlength=f.shape[0])
    values, rows = f[tokens, columns], w_dec
    if w_dec.dtype != f.dtype:
        # a bag's weights have its rows' dtype: widen the rows that somebody uses
        used = columns.bincount(minlength=f.shape[1]) > 0
        columns = (used.cumsum(0) - 1)[columns]
        rows = w_dec[used].to(f.dtype)
    starts = counts.cumsum(0) - counts
    out = functional.embedding_bag(columns, rows, starts, per_sample_weights=values, mode="sum")
    return (out + b_dec).to(w_dec.dtype)


ENCODE: dict[str, Callable[[], Callable[..., Any]]] = {
    "reference": lambda: encode_in_torch,
    "fused": lambda: encode_fused,
    "cpu": lambda: encode_on_cpu,
}
DECODE: dict[str, Callable[[], Callable[..., Any]]] = {
    "reference": lambda: decode_in_torch,
    "fused": lambda: decode_on_gpu,
    "cpu": lambda: decode_on_cpu,
}


@torch.library.custom_op("hooked_vla::threshold_encode", mutates_args=())
def encode_op(x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    """f [n m] in b_enc's dtype."""
    return implementation("threshold_encode", ENCODE, x)(x, w_enc, b_enc, threshold)


@encode_op.register_fake
def _(x, w_enc, b_enc, threshold):
    return b_enc.new_empty((x.shape[0], w_enc.shape[0]))


def _save_encode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_enc, _, _ = inputs
    ctx.save_for_backward(x, w_enc, output)


@without_autocast
def _encode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w_enc, f = ctx.saved_tensors
    grad = torch.where(f != 0, grad, 0)
    needs = ctx.needs_input_grad
    d_x = (grad @ w_enc.to(grad.dtype)).to(x.dtype) if needs[0] else None
    d_w = (grad.T @ x.to(grad.dtype)).to(w_enc.dtype) if needs[1] else None
    return d_x, d_w, grad.sum(0) if needs[2] else None, None


encode_op.register_autograd(_encode_backward, setup_context=_save_encode)


@torch.library.custom_op("hooked_vla::code_decode", mutates_args=())
def decode_op(f: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    """f·w_dec + b_dec [n d] in w_dec's dtype."""
    return implementation("code_decode", DECODE, w_dec)(f, w_dec, b_dec)


@decode_op.register_fake
def _(f, w_dec, b_dec):
    return w_dec.new_empty((f.shape[0], w_dec.shape[1]))


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@without_autocast
def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    f, w_dec, b_dec = ctx.saved_tensors
    grad, needs = grad.to(f.dtype), ctx.needs_input_grad
    d_f = grad @ w_dec.to(f.dtype).T if needs[0] else None
    d_w = (f.T @ grad).to(w_dec.dtype) if needs[1] else None
    return d_f, d_w, grad.sum(0).to(b_dec.dtype) if needs[2] else None


decode_op.register_autograd(_decode_backward, setup_context=_save_decode)
