"""Where the tokens of a camera stand in its image, as measured: whatever a processor did to the image is undone.

A processor may scale, pad, crop or squash an image; it does so in straight lines along rows and columns. So images
whose brightness is the place of each pixel are sent through it, and tell where every pixel of the model's image came
from. What the tower and the connector make of that image (patches, strided convolutions, merged neighbours) is
arithmetic on their own modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int, Num
from torch import Tensor, nn

from hooked_vla.components.connector import GridConnector, PixelShuffleConnector
from hooked_vla.components.davit import ConvTower
from hooked_vla.components.patch_vit import PatchMerger, PatchViT, merge_order
from hooked_vla.components.resnet import ResNet
from hooked_vla.components.tower import Towers
from hooked_vla.components.vit import ViT
from hooked_vla.hooks import HookedModel
from hooked_vla.inputs import EmbodiedInputs, Observation, StepInputs, VLAInputs, image_segment

# a processor that is no straight scaling leaves more than this share of the image unexplained
_STRAIGHT = 0.02


@dataclass(frozen=True, eq=False)
class CameraView:
    """Which cell of a grid of tokens each pixel of a camera's image went to.

    camera: the camera as the model's token segments name it; source: as the observation names it. grid: rows and
    columns of tokens. row_of, column_of: the cell's row and column of each pixel row and column, -1 where the
    processor cut it off. n_before: tokens of the camera's segment that stand before the grid and see the whole image.
    order: place in the grid, counted row by row, of each token.
    """

    camera: str
    source: str
    grid: tuple[int, int]
    row_of: Int[np.ndarray, " height"]
    column_of: Int[np.ndarray, " width"]
    n_before: int
    order: Int[Tensor, " token"]

    @property
    def segment(self) -> str:
        """The token segment of the camera."""
        return image_segment(self.camera)

    @property
    def n_tokens(self) -> int:
        return self.n_before + self.grid[0] * self.grid[1]

    @property
    def seen(self) -> Bool[np.ndarray, "height width"]:
        """The pixels that reach the model."""
        return (self.row_of >= 0)[:, None] & (self.column_of >= 0)[None]

    def on_grid(self, tokens: Float[Tensor, "*any token"]) -> Float[Tensor, "*any row column"]:
        """Numbers of the camera's tokens at their places; those of tokens before the grid are left out.

        Raises ValueError for another number of tokens.
        """
        if tokens.shape[-1] != self.n_tokens:
            raise ValueError(
                f"camera {self.camera!r} has {self.n_tokens} tokens ({self.n_before} before a grid of {self.grid[0]} "
                f"× {self.grid[1]}), got {tokens.shape[-1]}"
            )
        placed = torch.empty_like(tokens[..., self.n_before :])
        placed[..., self.order.to(tokens.device)] = tokens[..., self.n_before :]
        return rearrange(placed, "... (row column) -> ... row column", row=self.grid[0])

    def on_image(self, cells: Num[np.ndarray, "*any row column"]) -> Float64[np.ndarray, "*any height width"]:
        """Every pixel of the camera's image gets its cell's number, NaN where it reaches no cell.

        Raises ValueError for cells of another grid.
        """
        self._check(cells.shape[-2:])
        spread = cells[..., self.row_of[:, None], self.column_of[None]].astype(np.float64)
        return np.where(self.seen, spread, np.nan)

    def counts(self, mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "row column"]:
        """How many pixels of a mask over the camera's image lie in each cell.

        Raises ValueError for a mask of another size than the image.
        """
        if mask.shape != (len(self.row_of), len(self.column_of)):
            raise ValueError(
                f"camera {self.camera!r} shows {len(self.row_of)} × {len(self.column_of)} pixels, the mask has "
                f"{list(mask.shape)}"
            )
        rows, columns = np.nonzero(mask & self.seen)
        found = np.zeros(self.grid, np.int64)
        np.add.at(found, (self.row_of[rows], self.column_of[columns]), 1)
        return found

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Where a cell's pixels begin and end: top, bottom, left, right, the ends excluded; both 0 along an axis where
        it has none."""
        spans = []
        for of, cell in ((self.row_of, row), (self.column_of, column)):
            inside = np.flatnonzero(of == cell)
            spans += [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, 0]
        top, bottom, left, right = spans
        return top, bottom, left, right

    def _check(self, shape: Sequence[int]) -> None:
        if tuple(shape) != self.grid:
            raise ValueError(f"camera {self.camera!r} has a grid of {self.grid}, got {tuple(shape)}")


def camera_views(model: HookedModel, obs: Observation, tower: bool = False) -> dict[str, CameraView]:
    """The views of all cameras of an observation, by the names that token segments give them.

    obs: with images of the size in question; what they show does not matter. tower: of the tokens inside the vision
    tower, instead of those that it hands on.
    Raises TypeError for a vision tower or connector whose geometry is not known, ValueError for a processor that does
    more than scale, pad and crop.
    """
    probes, sources = _probes(obs)
    inputs = model.prepare(probes)
    shown, cameras = _model_images(model, inputs)
    views = {}
    for slot, camera in enumerate(cameras):
        # row 0 is black; of each camera's three rows, the others' images are black too
        black, white = shown[0, slot], shown[1::3, slot]
        source = next((i for i, each in enumerate(white) if not torch.equal(each, black)), None)
        if source is None:
            # a blank image in the place of a camera that the robot lacks
            continue
        name, (height, width) = sources[source]
        rows, columns, n_before, order = _grid(model, (shown.shape[-2], shown.shape[-1]), tower)
        first = 1 + 3 * source
        whiteness = (shown[first, slot] - black).double().cpu().numpy()
        ramps = [(shown[first + i, slot] - black).double().cpu().numpy() for i in (1, 2)]
        axes = []
        for axis, (cells, ramp, size) in enumerate(zip((rows, columns), ramps, (height, width), strict=True)):
            start, step = _straight_line(whiteness, ramp, axis, size, name)
            axes.append(cells.of_places((np.arange(size) + 0.5 - start) / step))
        views[camera] = CameraView(camera, name, (rows.n, columns.n), axes[0], axes[1], n_before, order)
    return views


@dataclass(frozen=True)
class _Cells:
    """One axis of a grid over the model's image. n: cells; start: where the first begins, stride: their width, pixels.

    size: of the image. overlap: cells reach beyond their stride, so that what is next to the grid belongs to its edge.
    """

    n: int
    start: float
    stride: float
    size: int
    overlap: bool

    def of_places(self, places: Float64[np.ndarray, " pixel"]) -> Int[np.ndarray, " pixel"]:
        """The cell of each place on the model's image, -1 outside of the image and, unless cells overlap, the grid."""
        # a place on the border of two cells belongs to the later one, whatever rounding did to it
        cells = np.floor(np.round((places - self.start) / self.stride, 4)).astype(np.int64)
        if self.overlap:
            cells = cells.clip(0, self.n - 1)
        inside = (places >= 0) & (places < self.size) & (cells >= 0) & (cells < self.n)
        return np.where(inside, cells, -1)


def _probes(obs: Observation) -> tuple[Observation, list[tuple[str, tuple[int, int]]]]:
    """Row 0: all images black. Then for each camera in turn: its image white; as bright as it is far down; as bright
    as it is far right. Also each camera's name and its image's height and width."""
    sizes = {}
    for camera, image in obs.images.items():
        # bytes have their channels last, floats first (inputs.Observation)
        channels_last = image.dtype in (np.uint8, torch.uint8)
        height, width = image.shape[-3:-1] if channels_last else image.shape[-2:]
        sizes[camera] = (int(height), int(width))
    n_rows, images = 1 + 3 * len(sizes), dict[str, Tensor]()
    for i, (camera, (height, width)) in enumerate(sizes.items()):
        image = torch.zeros(n_rows, 3, height, width)
        image[1 + 3 * i] = 1
        image[2 + 3 * i] = ((torch.arange(height) + 0.5) / height)[:, None]
        image[3 + 3 * i] = (torch.arange(width) + 0.5) / width
        images[camera] = image
    state = torch.as_tensor(np.asarray(obs.state)) if not isinstance(obs.state, Tensor) else obs.state
    state = state[None] if state.ndim == 1 else state[:1]
    text = obs.instruction if isinstance(obs.instruction, str) else obs.instruction[0]
    return Observation(images, state.expand(n_rows, -1), [text] * n_rows), list(sizes.items())


def _model_images(model: Any, inputs: Any) -> tuple[Float[Tensor, "row camera height width"], tuple[str, ...]]:
    """One channel of every image as the network reads it, and the cameras' names."""
    if isinstance(inputs, EmbodiedInputs) and isinstance(model.net.vision, PatchViT):
        vision = model.net.vision
        frames, size, _ = vision.patch_embed.kernel_size
        assert inputs.images is not None
        rows, columns = (side // vision.merge for side in inputs.grid)
        images = rearrange(
            inputs.images, "b n (h w dh dw) (c f p q) -> b n c f (h dh p) (w dw q)",
            h=rows, w=columns, dh=vision.merge, dw=vision.merge, f=frames, p=size, c=3,
        )[:, :, :, 0]  # fmt: skip
    elif isinstance(inputs, StepInputs):
        images = None if inputs.images is None else inputs.images[:, -1]
    elif isinstance(inputs, VLAInputs | EmbodiedInputs):
        images = inputs.images
    else:
        raise TypeError(f"no images are known in inputs of the type {type(inputs).__name__}")
    if images is None or not inputs.cameras:
        raise ValueError("the model reads no images")
    return images[:, :, 0], inputs.cameras


def _straight_line(
    white: Float64[np.ndarray, "height width"], ramp: Float64[np.ndarray, "height width"], axis: int, size: int,
    camera: str,
) -> tuple[float, float]:  # fmt: skip
    """Where on the camera's image the model's image begins along one axis, and how far apart its pixels are; in pixels.

    white, ramp: what the processor made of images that are all 1, or as bright as the place, less what it makes of 0.
    """
    seen = np.abs(white) > 0.5 * np.abs(white).max()
    share = np.where(seen, ramp / np.where(seen, white, 1.0), 0.0)
    other = 1 - axis
    counts = seen.sum(other)
    places = np.flatnonzero(counts)
    values = share.sum(other)[places] / counts[places] * size
    # interpolation bends at the ends, where it has neighbours on one side only
    margin = 2 if len(places) > 8 else 0
    inner = slice(margin, len(places) - margin)
    if len(places) < 2:
        raise ValueError(f"camera {camera!r}: fewer than 2 pixels of its image reach the model")
    step, start = np.polyfit(places[inner] + 0.5, values[inner], 1)
    error = float(np.abs(start + step * (places[inner] + 0.5) - values[inner]).max())
    if step <= 0 or error > max(_STRAIGHT * size, 0.5):
        raise ValueError(
            f"camera {camera!r}: its processor does more than scale, pad and crop along "
            f"{'rows' if axis == 0 else 'columns'} (places are off by {error:.2f} of {size} pixels)"
        )
    return float(start), float(step)


def _grid(model: Any, size: tuple[int, int], tower: bool) -> tuple[_Cells, _Cells, int, Int[Tensor, " token"]]:
    """Rows and columns of tokens over images of so many pixels, tokens before the grid, and the order of the others."""
    vision, connector = model.net.vision, getattr(model.net, "connector", None)
    merge, n_before = 1, 0
    if not tower:
        merge = getattr(connector, "scale", 1) if isinstance(connector, PixelShuffleConnector) else merge
        merge = connector.merge if isinstance(connector, PatchMerger) else merge
        n_before = int(isinstance(connector, GridConnector))
    axes = []
    for axis, pixels in enumerate(size):
        centre, stride, n, overlap = 0.5, 1.0, pixels, False
        for kernel, by, padding in _convolutions(vision, axis):
            centre += ((kernel - 1) / 2 - padding) * stride
            stride, n = stride * by, (n + 2 * padding - kernel) // by + 1
            overlap |= kernel > by
        start = centre - stride / 2
        axes.append(_Cells(n // merge, start, stride * merge, pixels, overlap))
    if isinstance(connector, PixelShuffleConnector) and not tower and axes[0].n != axes[1].n:
        raise ValueError(
            f"{axes[0].n} × {axes[1].n} tokens: the connector takes patches as a square, so that tokens of other "
            "images belong to no place"
        )
    order = torch.arange(axes[0].n * axes[1].n)
    if tower and isinstance(vision, PatchViT):
        places = merge_order(axes[0].n, axes[1].n, vision.merge, torch.device("cpu"))
        order = places[:, 0] * axes[1].n + places[:, 1]
    return axes[0], axes[1], n_before, order


def _convolutions(vision: nn.Module, axis: int) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding) along an axis of all strided steps from pixels to the tower's last tokens."""

    def of(module: Any) -> tuple[int, int, int]:
        kernel, stride, padding = module.kernel_size[-2:], module.stride[-2:], module.padding[-2:]
        return kernel[axis], stride[axis], padding[axis]

    if isinstance(vision, ViT | PatchViT):
        return [of(vision.patch_embed)]
    if isinstance(vision, Towers):
        return [of(vision.get_submodule(vision.names[0]).get_submodule("patch_embed"))]
    if isinstance(vision, ConvTower):
        return [of(stage.get_submodule("conv")) for stage in vision.stages]
    if isinstance(vision, ResNet):
        # the stem's pooling has no module of its own (components/resnet.py)
        blocks = [block for stage in vision.stages for block in stage.children()]
        return [of(vision.conv1), (3, 2, 1), *(of(block.get_submodule("conv1")) for block in blocks)]
    raise TypeError(f"where the tokens of a {type(vision).__name__} stand in the image is not known")
