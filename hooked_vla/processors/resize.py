"""Image resizing on bytes, as image libraries do it: bicubic with antialiasing, and averages over areas."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

Images = UInt8[Tensor, "batch 3 height width"]
Resized = UInt8[Tensor, "batch 3 new_height new_width"]


def letterbox(images: Images) -> Resized:
    """Black bars on both sides that make the images square; the odd row or column goes to the bottom or right."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return functional.pad(images, (left, side - width - left, top, side - height - top))


def bicubic(images: Images, size: tuple[int, int]) -> Resized:
    """To (height, width), with antialiasing."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    # on bytes, like torchvision: fixed-point weights, and rounding between the two axes
    return functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def center_crop(images: Images, share: float, floor: bool) -> Resized:
    """The middle `share` of both sides. floor: their lengths are cut off rather than rounded."""
    if not 0 < share < 1:
        return images
    lengths = [side * share for side in images.shape[-2:]]
    height, width = (max(1, int(length) if floor else round(length)) for length in lengths)
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def area_shortest_edge(images: Images, edge: int) -> Resized:
    """The shorter side to `edge`, the aspect kept (OpenCV: INTER_AREA)."""
    height, width = images.shape[-2:]
    if min(height, width) == edge:
        return images
    scale = edge / min(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    weights = _shrinking if size[0] <= height and size[1] <= width else _growing
    rows, columns = weights(height, size[0]), weights(width, size[1])
    resized = torch.einsum("bchw,Hh,Ww->bcHW", images.float(), rows, columns)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _shrinking(old: int, new: int) -> Float[Tensor, "new old"]:
    """Every new pixel is the average of the interval that it covers."""
    edges = torch.arange(new + 1, dtype=torch.float64)[:, None] * (old / new)
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return (overlap.clamp(min=0) * (new / old)).float()


def _growing(old: int, new: int) -> Float[Tensor, "new old"]:
    """OpenCV's area interpolation where an image grows: linear only where a new pixel spans two old ones."""
    place = torch.arange(new, dtype=torch.float64)
    left = (place * (old / new)).floor()
    share = (place + 1) - (left + 1) * (new / old)
    share = torch.where(share <= 0, 0.0, share - share.floor())
    weights = torch.zeros(new, old, dtype=torch.float64)
    rows = torch.arange(new)
    weights[rows, left.long()] += 1 - share
    weights[rows, (left.long() + 1).clamp(max=old - 1)] += share
    return weights.float()


def whole_tokens(size: Sequence[int], unit: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """(height, width) near `size` in multiples of `unit`, within the bounds on its number of pixels (Qwen2-VL)."""
    height, width = size
    nearest = (round(height / unit) * unit, round(width / unit) * unit)
    if nearest[0] * nearest[1] > bounds[1]:
        shrunk = [side / math.sqrt(height * width / bounds[1]) for side in size]
        return max(unit, math.floor(shrunk[0] / unit) * unit), max(unit, math.floor(shrunk[1] / unit) * unit)
    if nearest[0] * nearest[1] < bounds[0]:
        grown = [side * math.sqrt(bounds[0] / (height * width)) for side in size]
        return math.ceil(grown[0] / unit) * unit, math.ceil(grown[1] / unit) * unit
    return nearest
