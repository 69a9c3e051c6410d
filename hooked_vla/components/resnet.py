"""Residual convolutional trunks of basic blocks (ResNet-18, ResNet-34; arXiv 1512.03385).

Feature maps are [image channel height width] inside; points show them as [image position channel], rows of positions
from the top, so that the last axis is the feature axis and positions have segments, as in every other stream.
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Segments
from hooked_vla.spec import ResNetSpec

FeatureMap = Float[Tensor, "image channel height width"]

# torchvision's resnet: strides of the four stages
_STRIDES = (1, 2, 2, 2)


class FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) / sqrt(running_var + eps) · weight + bias per channel; no parameters, only buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: FeatureMap) -> FeatureMap:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class BatchNorm(nn.Module):
    """The same with learned weight and bias; the statistics are never updated here, whatever the training mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        # torch's layout has it; nothing reads it
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: FeatureMap) -> FeatureMap:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


# GroupNorm with 16 channels a group: diffusion_policy's replacement of batch norm
NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "frozen_batch": FrozenBatchNorm,
    "batch": BatchNorm,
    "group": lambda channels, eps: nn.GroupNorm(channels // 16, channels, eps),
}


def show_map(point: HookPoint, x: FeatureMap) -> FeatureMap:
    """A feature map as `point` leaves it; the point sees [image position channel]."""
    if not point.listeners:
        return x
    shown = point(rearrange(x, "i c h w -> i (h w) c"))
    return rearrange(shown, "i (h w) c -> i c h w", h=x.shape[2])


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))), both convolutions 3 × 3."""

    def __init__(self, d_in: int, d_model: int, stride: int, norm: Callable[[int], nn.Module], stream: str) -> None:
        super().__init__()
        self.d_model = d_model
        self.conv1 = nn.Conv2d(d_in, d_model, 3, stride, padding=1, bias=False)
        self.norm1 = norm(d_model)
        self.conv2 = nn.Conv2d(d_model, d_model, 3, padding=1, bias=False)
        self.norm2 = norm(d_model)
        self.has_shortcut = stride != 1 or d_in != d_model
        if self.has_shortcut:
            self.shortcut_conv = nn.Conv2d(d_in, d_model, 1, stride, bias=False)
            self.shortcut_norm = norm(d_model)
        self.hook_conv1 = HookPoint("batch seq d_model", stream=stream)
        self.hook_conv2 = HookPoint("batch seq d_model", stream=stream)
        self.hook_resid_post = HookPoint("batch seq d_model", stream=stream)

    def forward(self, x: FeatureMap) -> Float[Tensor, "image d_model new_height new_width"]:
        conv1 = show_map(self.hook_conv1, self.norm1(self.conv1(x)).relu())
        conv2 = show_map(self.hook_conv2, self.norm2(self.conv2(conv1)))
        shortcut = self.shortcut_norm(self.shortcut_conv(x)) if self.has_shortcut else x
        return show_map(self.hook_resid_post, (conv2 + shortcut).relu())


class ResNet(nn.Module):
    """Images to the feature map of the last stage. `stream` is the name that this module has in the network."""

    def __init__(self, spec: ResNetSpec, stream: str) -> None:
        super().__init__()
        self.stream, self.d_stem, self.d_model = stream, spec.widths[0], spec.widths[-1]

        def norm(channels: int) -> nn.Module:
            return NORMS[spec.norm](channels, spec.eps)

        self.conv1 = nn.Conv2d(3, self.d_stem, 7, stride=2, padding=3, bias=False)
        self.norm1 = norm(self.d_stem)
        self.stages = nn.ModuleList()
        d_in = self.d_stem
        for i, (width, depth, stride) in enumerate(zip(spec.widths, spec.n_blocks, _STRIDES, strict=True)):
            strides = (stride,) + (1,) * (depth - 1)
            blocks = [
                BasicBlock(d_in if j == 0 else width, width, s, norm, self.stage_stream(i))
                for j, s in enumerate(strides)
            ]
            self.stages.append(nn.ModuleList(blocks))
            d_in = width
        self.hook_tokens = HookPoint("batch seq d_stem", stream=self.stage_stream(0))

    def forward(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image d_model new_height new_width"]:
        x = self.norm1(self.conv1(images.to(self.conv1.weight.dtype))).relu()
        x = show_map(self.hook_tokens, functional.max_pool2d(x, 3, stride=2, padding=1))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        return x

    def stage_stream(self, stage: int) -> str:
        """Name of the token stream of a stage's positions."""
        return f"{self.stream}.stages.{stage}"

    def segments(
        self, names: tuple[str, ...], of_row: Int[Tensor, " image"], height: int, width: int
    ) -> dict[str, Segments]:
        """Segments of every stage, and of the last under the module's own name, for images of that size in pixels.

        of_row: which of `names` each image is.
        """
        grids = resnet_grids(height, width)
        found = {
            self.stage_stream(i): Segments(names, repeat(of_row, "i -> i s", s=rows * columns), row_axis="image")
            for i, (rows, columns) in enumerate(grids)
        }
        return found | {self.stream: found[self.stage_stream(len(grids) - 1)]}


def resnet_grids(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of positions in every stage of a ResNet: each stride of 2 halves them, rounding up."""

    def halve(size: tuple[int, int], times: int) -> tuple[int, int]:
        for _ in range(times):
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        return size

    # the stem's convolution and pooling, then the stages' strides
    return [halve((height, width), 2 + i) for i in range(len(_STRIDES))]
