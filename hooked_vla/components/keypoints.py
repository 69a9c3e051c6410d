"""Image encoders that end in keypoints: where in the image each channel of a feature map is active on average.

Each camera can have an encoder of its own; its points then show that camera's images only.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vla.components.resnet import ResNet, resnet_grids
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Segments
from hooked_vla.spec import KeypointSpec, ResNetSpec


def image_size(resnet: ResNetSpec, keypoints: KeypointSpec) -> tuple[int, int]:
    """(height, width) of the images as the encoder reads them: cropped, else resized, else as the cameras give them."""
    return keypoints.crop or keypoints.resize or resnet.image_size


class SpatialSoftmax(nn.Module):
    """Expected position of each keypoint under its softmax over the map (arXiv 1509.06113), as (x, y) in -1..1."""

    pos_grid: Tensor

    def __init__(self, d_model: int, n_keypoints: int, rows: int, columns: int, stream: str) -> None:
        super().__init__()
        self.n_keypoints = n_keypoints
        self.proj = nn.Conv2d(d_model, n_keypoints, kernel_size=1)
        # in float64 and then rounded, as numpy's linspace: torch's differs in the last bit
        x = torch.linspace(-1, 1, columns, dtype=torch.float64).float().expand(rows, columns)
        y = torch.linspace(-1, 1, rows, dtype=torch.float64).float()[:, None].expand(rows, columns)
        self.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], dim=1))
        self.hook_heatmap = HookPoint("batch n_keypoints seq", stream=stream)
        self.hook_keypoints = HookPoint("batch n_keypoints 2", stream=stream)

    def forward(self, features: Float[Tensor, "image d_model rows columns"]) -> Float[Tensor, "image n_keypoints 2"]:
        scores = rearrange(self.proj(features), "i k h w -> i k (h w)")
        heatmap = self.hook_heatmap(scores.softmax(-1))
        return self.hook_keypoints(heatmap @ self.pos_grid)


class KeypointResNet(ResNet):
    """A ResNet and the keypoints of its last feature map, flattened."""

    def __init__(self, spec: ResNetSpec, keypoints: KeypointSpec, stream: str) -> None:
        super().__init__(spec, stream)
        rows, columns = resnet_grids(*image_size(spec, keypoints))[-1]
        last = self.stage_stream(len(self.stages) - 1)
        self.pool = SpatialSoftmax(self.d_model, keypoints.n_keypoints, rows, columns, last)

    def forward(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image d_keypoints"]:
        return rearrange(self.pool(super().forward(images)), "i k xy -> i (k xy)")


class FeatureConnector(nn.Module):
    """relu(x W + b): one feature vector an image."""

    def __init__(self, d_keypoints: int, stream: str) -> None:
        super().__init__()
        self.d_model = d_keypoints
        self.proj = nn.Linear(d_keypoints, d_keypoints)
        self.hook_out = HookPoint("batch d_model", stream=stream)

    def forward(self, keypoints: Float[Tensor, "image d_model"]) -> Float[Tensor, "image d_model"]:
        return self.hook_out(self.proj(keypoints.to(self.proj.weight.dtype)).relu())


class CameraTowers(nn.Module):
    """One module a camera; images come and features go with the cameras of a step next to each other."""

    def __init__(self, make: Callable[[str], nn.Module], n_cameras: int, stream: str) -> None:
        super().__init__()
        self.towers = nn.ModuleList(make(f"{stream}.towers.{i}") for i in range(n_cameras))

    def forward(self, images: Float[Tensor, " image *size"]) -> Float[Tensor, "image d_out"]:
        cameras = images.unflatten(0, (-1, len(self.towers))).unbind(1)
        features = [tower(camera) for tower, camera in zip(self.towers, cameras, strict=True)]
        return torch.stack(features, dim=1).flatten(0, 1)


def encoder_segments(
    vision: nn.Module, names: tuple[str, ...], n_images: int, height: int, width: int
) -> dict[str, Segments]:
    """Segments of "vision" and "connector", and of every tower in them, for so many images of each camera."""
    of_row = torch.arange(len(names)).repeat(n_images)
    if isinstance(vision, KeypointResNet):
        found = vision.segments(names, of_row, height, width)
    else:
        assert isinstance(vision, CameraTowers)
        found = {}
        for i, tower in enumerate(vision.towers):
            assert isinstance(tower, KeypointResNet)
            own = torch.zeros(n_images, dtype=torch.long)
            found |= tower.segments(names[i : i + 1], own, height, width)
            found[f"connector.towers.{i}"] = _one_each(names[i : i + 1], own)
        seq = found["vision.towers.0"].labels.shape[1]
        found["vision"] = Segments(names, of_row[:, None].expand(-1, seq), row_axis="image")
    return found | {"connector": _one_each(names, of_row)}


def _one_each(names: tuple[str, ...], of_row: Int[Tensor, " image"]) -> Segments:
    return Segments(names, of_row[:, None], row_axis="image")
