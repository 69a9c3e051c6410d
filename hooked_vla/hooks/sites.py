"""The hook points of a network: their names, and what is known of each before any run."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ROW_AXES, TOKEN_AXES
from hooked_vla.hooks.point import HookPoint, Run

# streams whose rows are single camera images rather than batch rows
_IMAGE_ROWS = frozenset({"vision", "connector"})


@dataclass(frozen=True)
class HookSite:
    """What is known of a hook point before any run.

    shape: numbers where the model fixes the size, axis names where the inputs do. denoised: fires once per denoise
    step, and has a leading denoise axis in a cache. reaches_action: False for a dead end, a value that no action
    depends on.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    axes: tuple[str, ...]
    meaning: str
    pathway: str
    denoised: bool
    reaches_action: bool


def name_points(net: nn.Module, run: Run) -> dict[str, HookPoint]:
    """Every hook point of a network by name, told its name, its run, its axes and their token streams."""
    points = {}
    own_stream: dict[str, str] = {}
    for path, module in net.named_modules():
        axis_streams: Mapping[str, str] = getattr(module, "axis_streams", {})
        # a module whose `stream` names a token stream other than its pathway's speaks for all modules inside it
        around = own_stream.get(path.rpartition(".")[0], "")
        own_stream[path] = getattr(module, "stream", around)
        for attribute, point in vars(module).items():
            if not isinstance(point, HookPoint):
                continue
            point.name = f"{path}.{attribute}" if path else attribute
            point.run = run
            way = hook_names.pathway(point.name)
            if way in _IMAGE_ROWS:
                point.axes = tuple("image" if axis == "batch" else axis for axis in point.axes)
            own = point.stream or own_stream[path] or way
            point.streams = {axis: axis_streams.get(axis, own) for axis in point.axes if axis in TOKEN_AXES}
            points[point.name] = point
    return points


def describe_points(net: nn.Module, points: Mapping[str, HookPoint], dead_ends: Container[str]) -> dict[str, HookSite]:
    """Every hook point with its shape, dtype, axes and meaning. dead_ends: names of those that reach no action."""
    dtypes = {name: _stream_dtype(part) for name, part in net.named_children()}
    owners = dict(net.named_modules())
    sites = {}
    for name, point in points.items():
        way = hook_names.pathway(name)
        dtype = dtypes[way] if point.dtype == "stream" else getattr(torch, point.dtype)
        sites[name] = HookSite(
            name=name,
            shape=tuple(_axis_size(axis, name, owners) for axis in point.axes),
            dtype=dtype,
            axes=point.axes,
            meaning=hook_names.meaning(name),
            pathway=way,
            denoised=hook_names.is_denoised(name),
            reaches_action=name not in dead_ends,
        )
    return sites


def runtime_size(axis: str, point: HookPoint, sizes: Mapping[str, Sequence[int]], batch_size: int) -> int:
    """The size of an axis that the inputs decide. sizes: rows and tokens of each token stream."""
    if axis in ROW_AXES:
        rows = next(iter(point.streams.values())) if axis == "window" else point.pathway
        # a tower for one camera sees fewer images than the whole pathway
        rows = point.stream if axis == "image" and point.stream and point.stream in sizes else rows
        return batch_size if axis == "batch" else sizes[rows][0]
    return sum(sizes[stream][1] for stream in point.streams[axis].split("+"))


def _stream_dtype(part: nn.Module) -> torch.dtype:
    """Dtype of a pathway's residual stream: that of its blocks' first query projection, or first parameter where
    there is none, since embeddings, norms and heads may be float32 islands."""
    parameters = dict(getattr(part, "blocks", part).named_parameters())
    queries = [parameter for name, parameter in parameters.items() if name.endswith("q_proj.weight")]
    parameter = next(iter([*queries, *parameters.values()]), None)
    return torch.float32 if parameter is None else parameter.dtype


def _axis_size(axis: str, name: str, owners: Mapping[str, nn.Module]) -> int | str:
    """The size that the owning module, or one around it, gives the axis; the axis name if only inputs decide it."""
    if axis.isdigit():
        return int(axis)
    path = name.rsplit(".", 1)[0]
    while True:
        size = getattr(owners[path], axis, None)
        if isinstance(size, int):
            return size
        if not path:
            return axis
        path = path.rsplit(".", 1)[0] if "." in path else ""
