"""The image battery: 24 named ways to change a camera's picture, photometric, geometric, or by removal.

Pictures are changed as the camera gives them, uint8 [H W 3], before any preprocessing, through kornia where it has the
operation. Every kind has a strength: 1 is the battery's own, 0 changes nothing, and those that know no degrees take 1
alone. What a turned or shifted picture uncovers is filled with the nearest pixels of its edge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, radians, sin
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra

PHOTOMETRIC, GEOMETRIC, REMOVAL = "photometric", "geometric", "removal"
Picture = Float[Tensor, "1 3 height width"]
Change = Callable[[Any, Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class ImageKind:
    """One way to change a picture. graded: it takes strengths other than 1. make(kornia, picture, strength, generator):
    the picture, with values that may leave 0..1."""

    name: str
    group: str
    description: str
    make: Change
    graded: bool = True


def change_image(
    kind: str, image: UInt8[np.ndarray, "height width channel"], strength: float = 1.0, seed: int | tuple[int, ...] = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture, changed, of the same size; the argument stays as it is. seed: of noise.

    Raises ValueError for an unknown kind, a negative strength, another than 1 for a kind without degrees, and a picture
    that is not uint8 [H W 3].
    """
    if kind not in IMAGE_KINDS:
        raise ValueError(f"unknown kind {kind!r} of image change; kinds: {list(IMAGE_KINDS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture must be uint8 [H W 3], got {image.dtype} {list(image.shape)}")
    check_strength(kind, strength)
    with needs_analysis_extra():
        import kornia
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state))
    # a copy: what comes next may write in place
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    changed = IMAGE_KINDS[kind].make(kornia, picture, strength, generator)
    rounded = (changed.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded[0].permute(1, 2, 0).numpy())


def check_strength(kind: str, strength: float) -> None:
    """Raises ValueError for a strength that the kind does not take."""
    if not np.isfinite(strength) or strength < 0:
        raise ValueError(f"{kind}: the strength must be a number from 0, got {strength}")
    if strength != 1 and not IMAGE_KINDS[kind].graded:
        raise ValueError(f"{kind} knows no degrees: its strength is 1, got {strength}")


def _brightness(up: bool) -> Change:
    return lambda kornia, x, s, g: kornia.enhance.adjust_brightness(x, 0.3 * s if up else -0.3 * s)


def _contrast(up: bool) -> Change:
    return lambda kornia, x, s, g: kornia.enhance.adjust_contrast_with_mean_subtraction(x, 2.0**s if up else 0.5**s)


def _grayscale(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    return torch.lerp(x, kornia.color.rgb_to_grayscale(x).expand_as(x), min(s, 1.0))


def _hue(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    # 60 degrees: every primary colour becomes another one's neighbour
    return kornia.enhance.adjust_hue(x, radians(60 * s)) if s else x


def _gamma(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    return kornia.enhance.adjust_gamma(x, 1.8**s)


def _noise(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    return x + 0.08 * s * torch.randn(x.shape, generator=g)


def _salt_and_pepper(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    draw = torch.rand(x.shape[-2:], generator=g)
    share = min(0.05 * s, 1.0)
    # half of them black, half white
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, x))


def _blur(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    if not s:
        return x
    # as wide as 1/64 of the picture; the kernel reaches to three standard deviations
    sigma = s * x.shape[-1] / 64
    size = 2 * max(1, round(3 * sigma)) + 1
    size = min(size, 2 * (min(x.shape[-2:]) // 2) - 1)
    return kornia.filters.gaussian_blur2d(x, (size, size), (sigma, sigma))


def _posterize(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    # 8 bits are all of them
    return kornia.enhance.posterize(x, max(1, round(8 - 5 * s)))


def _colour_cast(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    # warm light: red up, blue down
    return x * (1 + s * torch.tensor([0.25, 0.0, -0.25])[:, None, None])


def _affine(matrix: Callable[[float], tuple[float, float, float, float, float, float]]) -> Change:
    """Places move by x' = a x + b y + c, y' = d x + e y + f, from the centre, in half widths; y points down."""

    def make(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
        a, b, c, d, e, f = matrix(s)
        moved = torch.tensor([[a, b, c], [d, e, f], [0, 0, 1]], dtype=torch.float64)
        return _warp(kornia, x, moved)

    return make


def _warp(kornia: Any, x: Tensor, moved: Tensor) -> Tensor:
    """moved: 3 × 3, homogeneous places before -> after, from the centre, in half widths; y points down."""
    height, width = x.shape[-2:]
    # one unit along both axes: a turned picture is not stretched where it is not square
    half_x, half_y = (width - 1) / 2, (height - 1) / 2
    pixels = torch.tensor([[half_x, 0, half_x], [0, half_x, half_y], [0, 0, 1]], dtype=torch.float64)
    # in double precision: an identity must come out as one
    whole = (pixels @ moved @ torch.linalg.inv(pixels)).to(x.dtype)[None]
    return kornia.geometry.warp_perspective(
        x, whole, (height, width), mode="bilinear", padding_mode="border", align_corners=True
    )


def _turn(degrees: int) -> Change:
    """Counter-clockwise by so many degrees times the strength."""

    def matrix(s: float) -> tuple[float, float, float, float, float, float]:
        c, t = cos(radians(degrees * s)), sin(radians(degrees * s))
        return c, t, 0.0, -t, c, 0.0

    return _affine(matrix)


def _perspective(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    # the upper edge further away than the lower one
    return _warp(kornia, x, torch.tensor([[1, 0, 0], [0, 1, 0], [0, -0.25 * s, 1]], dtype=torch.float64))


def _occlude(kornia: Any, x: Tensor, s: float, g: torch.Generator) -> Tensor:
    """A grey square over the middle, with half the picture's sides at strength 1."""
    height, width = x.shape[-2:]
    tall, wide = (min(side, round(0.5 * s * side)) for side in (height, width))
    top, left = (height - tall) // 2, (width - wide) // 2
    x[..., top : top + tall, left : left + wide] = 0.5
    return x


IMAGE_KINDS = {
    kind.name: kind
    for kind in (
        ImageKind("brightness_up", PHOTOMETRIC, "0.3 added", _brightness(True)),
        ImageKind("brightness_down", PHOTOMETRIC, "0.3 subtracted", _brightness(False)),
        ImageKind("contrast_up", PHOTOMETRIC, "twice as far from the mean grey", _contrast(True)),
        ImageKind("contrast_down", PHOTOMETRIC, "half as far from the mean grey", _contrast(False)),
        ImageKind("grayscale", PHOTOMETRIC, "no colours", _grayscale),
        ImageKind("hue", PHOTOMETRIC, "hues turned by 60 degrees", _hue),
        ImageKind("gamma", PHOTOMETRIC, "gamma 1.8", _gamma),
        ImageKind("noise", PHOTOMETRIC, "Gaussian noise of standard deviation 0.08", _noise),
        ImageKind("salt_and_pepper", PHOTOMETRIC, "5 % of the pixels black or white", _salt_and_pepper),
        ImageKind("blur", PHOTOMETRIC, "Gaussian blur of 1/64 of the width", _blur),
        ImageKind("posterize", PHOTOMETRIC, "3 bits a channel", _posterize),
        ImageKind("colour_cast", PHOTOMETRIC, "red 25 % up, blue 25 % down", _colour_cast),
        ImageKind("horizontal_flip", GEOMETRIC, "left and right exchanged", lambda k, x, s, g: x.flip(-1), False),
        ImageKind("vertical_flip", GEOMETRIC, "upside down, mirrored", lambda k, x, s, g: x.flip(-2), False),
        ImageKind("rotate_10", GEOMETRIC, "turned by 10 degrees", _turn(10)),
        ImageKind("rotate_90", GEOMETRIC, "turned by 90 degrees", _turn(90), False),
        ImageKind("rotate_180", GEOMETRIC, "turned by 180 degrees", _turn(180), False),
        ImageKind("translate", GEOMETRIC, "right by 15 % of the width", _affine(lambda s: (1, 0, 0.3 * s, 0, 1, 0))),
        ImageKind("zoom_in", GEOMETRIC, "1.3 times as large", _affine(lambda s: (1.3**s, 0, 0, 0, 1.3**s, 0))),
        ImageKind("zoom_out", GEOMETRIC, "1.3 times as small", _affine(lambda s: (1.3**-s, 0, 0, 0, 1.3**-s, 0))),
        ImageKind("shear", GEOMETRIC, "x shifted by 0.2 y", _affine(lambda s: (1, 0.2 * s, 0, 0, 1, 0))),
        ImageKind("perspective", GEOMETRIC, "upper edge further away", _perspective),
        ImageKind("occlude", REMOVAL, "a grey square over a quarter of the picture", _occlude),
        ImageKind("blank", REMOVAL, "grey all over", lambda k, x, s, g: torch.full_like(x, 0.5), False),
    )
}
