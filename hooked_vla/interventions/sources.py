"""Sources, directions and bases as operators hold them: checked against a hook point, and with all of its axes."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions.places import Site
from hooked_vla.interventions.values import Values
from hooked_vla.kernels.lowrank_edit import MAX_RANK

Table = Float[Tensor, "step row place channel"]


def _width(site: Site, label: str) -> int:
    if site.width is None:
        raise ValueError(f"{label}: {site.name} ({site.axes}) has no fixed width that it could fit")
    return site.width


def vector(values: Values, site: Site, label: str) -> Float[Tensor, " channel"]:
    """A direction, flattened. Raises ValueError unless it has as many numbers as a place of the hook point."""
    width = _width(site, label)
    if values.shape not in ((width,), site.channel_shape):
        raise ValueError(f"{label} is {list(values.shape)}, but {site.name} is {width} wide ({site.axes})")
    return values.tensor.flatten()


def orthonormal(values: Values, site: Site, label: str) -> Float[Tensor, "r channel"]:
    """Orthonormal rows, float64, that span what the basis spans; a basis that is orthonormal already is its own.

    Raises ValueError for another width, a rank above MAX_RANK or the width, and linearly dependent rows.
    """
    width = _width(site, label)
    if values.shape[-1] != width and values.shape[-len(site.channel_shape) :] != site.channel_shape:
        raise ValueError(f"{label} is {list(values.shape)}, but {site.name} is {width} wide ({site.axes})")
    basis = values.tensor.double().reshape(-1, width)
    rank = len(basis)
    if rank > min(MAX_RANK, width):
        raise ValueError(f"{label} has {rank} rows, more than {min(MAX_RANK, width)}, at {site.name}")
    identity = torch.eye(rank, dtype=basis.dtype, device=basis.device)
    if bool((basis @ basis.T - identity).abs().max() < 1e-6):
        return basis
    q, r = torch.linalg.qr(basis.T)
    pivots = r.diagonal().abs()
    if bool(pivots.min() <= pivots.max() * 1e-7):
        raise ValueError(f"{label}: its {rank} rows are linearly dependent")
    return q.T


def source_table(values: Values, site: Site, denoise: tuple[int, ...] | None, label: str) -> Table:
    """A source with all of its axes, those that it does not have of size 1.

    denoise: the denoise steps that are edited; None for all.
    Raises ValueError for a shape that is not one of those that `Patch` names.
    """
    tensor, layout = _unflattened(values.tensor, site), site.layout
    n_axes = len(layout.axes)
    with_steps = tensor.ndim == n_axes + 1 and hook_names.is_denoised(site.name)
    if with_steps and site.n_steps is not None and len(tensor) not in (site.n_steps, len(denoise or ())):
        raise ValueError(f"{label} has {len(tensor)} denoise steps, but the model has {site.n_steps}")
    if not with_steps:
        tensor = _with_leading(tensor, site, label)[None]
    for i in layout.channels:
        if isinstance(site.sizes[i], int) and tensor.shape[i + 1] != site.sizes[i]:
            raise ValueError(_misfit(values, site, label))
    return torch.stack([layout.flatten(each) for each in tensor])


def _misfit(values: Values, site: Site, label: str) -> str:
    shown = " ".join(
        f"{axis}={size}" if isinstance(size, int) else axis
        for axis, size in zip(site.layout.axes, site.sizes, strict=True)
    )
    return f"{label} is {list(values.shape)}, but {site.name} is [{shown}]"


def _unflattened(tensor: Tensor, site: Site) -> Tensor:
    """The tensor with the channels in as many axes as the hook point has them."""
    shape = site.channel_shape
    if (
        len(shape) > 1
        and site.width is not None
        and tensor.shape[-1] == site.width
        and tensor.shape[-len(shape) :] != shape
    ):
        return tensor.unflatten(-1, [size for size in shape if isinstance(size, int)])
    return tensor


def _with_leading(tensor: Tensor, site: Site, label: str) -> Tensor:
    """The tensor with row and place axes, of size 1 where it does not have them."""
    layout, n_axes = site.layout, len(site.layout.axes)
    missing = n_axes - tensor.ndim
    has_place = layout.place is not None
    if missing == 0:
        return tensor
    if missing == layout.has_rows + has_place and tensor.ndim == len(layout.channels):
        if has_place:
            tensor = tensor.unsqueeze((layout.place or 0) - layout.has_rows)
        return tensor[None] if layout.has_rows else tensor
    if missing == 1 and layout.has_rows:
        return tensor[None]
    raise ValueError(
        f"{label} is {list(tensor.shape)}, but {site.name} is [{site.axes}]; a source has those axes, or all but the "
        "first, or only the last ones, and where it differs by denoise step one more in front"
    )


def overwrite_table(value: "float | Values", site: Site, channels: tuple[int, ...] | None, label: str) -> Table:
    """What `Overwrite` writes. Raises ValueError for another width."""
    if not isinstance(value, Values):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64, device="cpu")
    if channels is None or value.shape == site.channel_shape:
        return vector(value, site, label)[None, None, None]
    if value.shape != (len(channels),):
        raise ValueError(f"{label} is {list(value.shape)} for {len(channels)} channels of {site.name}")
    shape = [size for size in site.channel_shape if isinstance(size, int)]
    row = value.tensor.new_zeros(shape[-1])
    row[list(channels)] = value.tensor
    return row.expand(shape).reshape(1, 1, 1, -1)


def bank_table(values: Values, site: Site, label: str) -> Table:
    """Tokens to draw from, [n channels]. Raises ValueError for another shape."""
    width = _width(site, label)
    if values.shape[1:] not in ((width,), site.channel_shape):
        raise ValueError(f"{label} is {list(values.shape)}; it must be [n {width}], tokens as {site.name} has them")
    return values.tensor.reshape(1, 1, -1, width)
