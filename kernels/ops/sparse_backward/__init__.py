"""Gradients of a sparse code: of the values, of both dictionaries, of the encoder's bias.

Only the k active features of a token are touched. The dictionaries' gradients are summed feature by feature over the
entries in order of feature (a transposed, CSC, view of the code): one pass, no atomics, the same bits every run.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hooked_vla.kernels import checks
from hooked_vla.kernels.checks import wide
from hooked_vla.kernels.dispatch import implementation, paths_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DOTS, OUTER, BACKWARD = (paths_of(__name__, name) for name in ("sparse_dots", "sparse_outer", "sparse_backward"))


def check_entries(op: str, values: Tensor, indices: Tensor, n: int | None, w: Tensor) -> None:
    """Checks the code (values, indices) of n tokens, or of any number of them, for the dictionary w."""
    checks.check_matrix(op, "values", values, (n, None), wide(w.dtype), w.device)
    checks.check_matrix(op, "indices", indices, tuple(values.shape), torch.int32, w.device)


@torch.library.custom_op("hooked_vla::sparse_dots", mutates_args=())
def dots_op(grad: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return implementation("sparse_dots", DOTS, w)(grad, indices, w)


@dots_op.register_fake
def _(grad: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return w.new_empty(indices.shape, dtype=wide(w.dtype))


@torch.library.custom_op("hooked_vla::sparse_outer", mutates_args=())
def outer_op(values: Tensor, indices: Tensor, x: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return implementation("sparse_outer", OUTER, x)(values, indices, x, m, dtype)


@outer_op.register_fake
def _(values: Tensor, indices: Tensor, x: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty((m, x.shape[1]), dtype=dtype), values.new_empty(m)


@torch.library.custom_op("hooked_vla::sparse_backward", mutates_args=())
def backward_op(
    grad: Tensor, x: Tensor | None, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation("sparse_backward", BACKWARD, w_dec)(grad, x, values, indices, w_dec, relu)


@backward_op.register_fake
def _(
    grad: Tensor, x: Tensor | None, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, d = w_dec.shape
    d_w_enc = w_dec.new_empty((0 if x is None else m, d))
    return torch.empty_like(values), torch.empty_like(w_dec), d_w_enc, values.new_empty(m)


def sparse_dots(
    grad: Float[Tensor, "n d"], indices: Int32[Tensor, "n k"], w: Float[Tensor, "m d"], *, validate: bool | None = None
) -> Float[Tensor, "n k"]:
    """dots[t, j] = grad[t] · w[indices[t, j]]: the gradient of a decoder's values (a sampled dense-dense product).

    grad: any float dtype; w: float32, bfloat16, float16 or float64. Contiguous, on one device.
    validate: whether to look at the numbers, which on a GPU waits for it; by default on a CPU.
    Returns float32 (float64 where w is), accumulated in that dtype. Not differentiable.
    Raises TypeError (dtype) or ValueError (shape, device, layout, an index outside [0, m), a NaN or infinity).
    """
    op = "sparse_dots"
    checks.check_matrix(op, "w", w, (None, None), FLOATS)
    checks.check_matrix(op, "grad", grad, (None, w.shape[1]), FLOATS, w.device)
    checks.check_matrix(op, "indices", indices, (grad.shape[0], None), torch.int32, w.device)
    if checks.validates(validate, w):
        checks.check_range(op, "indices", indices, w.shape[0])
        checks.check_finite(op, "grad", grad)
        checks.check_parameter(op, "w", w)
    return dots_op(grad, indices, w)


def sparse_outer(
    values: Float[Tensor, "n k"],
    indices: Int32[Tensor, "n k"],
    x: Float[Tensor, "n d"],
    m: int,
    *,
    dtype: torch.dtype | None = None,
    validate: bool | None = None,
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """outer[i] = Σ values[t, j]·x[t] and total[i] = Σ values[t, j] over all (t, j) with indices[t, j] == i.

    The gradient of a dictionary of m rows: of the decoder with (values, grad), of the encoder and its bias with
    (d_values, x). values: float32 (float64 where x is); x: any float dtype. Contiguous, on one device.
    dtype: of outer, by default that of values, which is also what is accumulated in. Not differentiable.
    validate: as for sparse_dots.
    Raises TypeError (dtype) or ValueError (shape, device, layout, an index outside [0, m), a NaN or infinity).
    """
    op = "sparse_outer"
    checks.check_matrix(op, "x", x, (None, None), FLOATS)
    check_entries(op, values, indices, x.shape[0], x)
    m = checks.check_int(op, "m", m)
    if m < 1:
        raise ValueError(f"{op}: m must be at least 1, got {m}")
    if dtype not in (None, *FLOATS):
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    if checks.validates(validate, x):
        checks.check_range(op, "indices", indices, m)
        checks.check_finite(op, "values", values)
        checks.check_finite(op, "x", x)
    return outer_op(values, indices, x, m, dtype or values.dtype)


def sparse_backward(
    grad: Float[Tensor, "n d"],
    x: Float[Tensor, "n d"] | None,
    values: Float[Tensor, "n k"],
    indices: Int32[Tensor, "n k"],
    w_dec: Float[Tensor, "m d"],
    *,
    relu: bool,
    validate: bool | None = None,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m d"], Float[Tensor, "m d"] | None, Float[Tensor, " m"]]:
    """Gradients of sparse_decode(values, indices, w_dec) with values = (x·w_encᵀ + b_enc)[indices], given grad.

        d_values[t, j] = grad[t] · w_dec[indices[t, j]], with relu zero where values[t, j] <= 0
        d_w_dec[i] = Σ values[t, j]·grad[t]         over all (t, j) with indices[t, j] == i
        d_w_enc[i] = Σ d_values[t, j]·x[t]          likewise; None without x
        d_b_enc[i] = Σ d_values[t, j]               likewise

    The selection itself has no gradient, as everywhere in top-k autoencoders.
    grad, x: any float dtype; w_dec: float32, bfloat16, float16 or float64; values: float32 (float64 where w_dec is).
    All contiguous, on one device. Returns d_values and d_b_enc in values' dtype, the dictionaries' gradients in
    w_dec's, accumulated in values' dtype; the same bits every run. Not differentiable.
    validate: as for sparse_dots.
    Raises TypeError (dtype) or ValueError (shape, device, layout, an index outside [0, m), a NaN or infinity).
    """
    op = "sparse_backward"
    checks.check_matrix(op, "w_dec", w_dec, (None, None), FLOATS)
    checks.check_matrix(op, "grad", grad, (None, w_dec.shape[1]), FLOATS, w_dec.device)
    if x is not None:
        checks.check_matrix(op, "x", x, tuple(grad.shape), FLOATS, w_dec.device)
    check_entries(op, values, indices, grad.shape[0], w_dec)
    if checks.validates(validate, w_dec):
        checks.check_range(op, "indices", indices, w_dec.shape[0])
        for name, each in (("grad", grad), ("values", values), ("x", x)):
            if each is not None:
                checks.check_finite(op, name, each)
        checks.check_parameter(op, "w_dec", w_dec)
    d_values, d_w_dec, d_w_enc, d_b_enc = backward_op(grad, x, values, indices, w_dec, relu)
    return d_values, d_w_dec, None if x is None else d_w_enc, d_b_enc
