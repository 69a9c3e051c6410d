"""Maps of attention laid over camera images, without pyplot: no window system, no global state."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Num, UInt8

from hooked_vla.analysis.attention_geometry import CameraView
from hooked_vla.extras import needs_analysis_extra

with needs_analysis_extra():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.patheffects import withStroke

# below and above uniform attention look different to colour-blind eyes too
COLOURS = "coolwarm"
# cells with a number in them, at most
_NUMBERED = 16


def around_one(grids: Sequence[Num[np.ndarray, "..."]]) -> Normalize:
    """One scale for several maps, as multiples of uniform attention, with uniform attention in the middle."""
    reach = max(float(np.nanmax(np.abs(np.asarray(grid) - 1))) for grid in grids) or 1.0
    return Normalize(1 - reach, 1 + reach)


def overlay(
    image: UInt8[np.ndarray, "height width 3"],
    grid: Num[np.ndarray, "row column"],
    view: CameraView,
    norm: Normalize,
    colours: str = COLOURS,
) -> Float64[np.ndarray, "height width 3"]:
    """The camera image's brightness in the colour of the map, in 0..1; pixels that reach no token are black and white.

    Raises ValueError for an image of another size than the view's, or a map of another grid.
    """
    if image.shape[:2] != view.seen.shape:
        raise ValueError(
            f"camera {view.camera!r}: the view is of {view.seen.shape} pixels, the image {image.shape[:2]}"
        )
    brightness = image.mean(-1, keepdims=True) / 255
    heat = view.on_image(np.asarray(grid))
    tinted = colormaps[colours](norm(np.nan_to_num(heat, nan=float(norm.vmin or 0))))[..., :3]
    return np.where(view.seen[..., None], tinted * (0.25 + 0.75 * brightness), brightness)


def draw_overlay(
    axes: Axes,
    image: UInt8[np.ndarray, "height width 3"],
    grid: Num[np.ndarray, "row column"],
    view: CameraView,
    norm: Normalize,
    outlines: Sequence[tuple[Bool[np.ndarray, "height width"], str]] = (),
    numbers: bool = True,
) -> None:
    """`overlay` in axes without ticks. outlines: masks and the colours of lines around them; numbers: cells that are
    large enough say their value."""
    axes.imshow(overlay(image, grid, view, norm))
    axes.set_xticks([])
    axes.set_yticks([])
    for mask, colour in outlines:
        axes.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.5)
    if not numbers or grid.size > _NUMBERED:
        return
    for row, column in np.ndindex(*view.grid):
        top, bottom, left, right = view.box(row, column)
        if bottom > top and right > left:
            place = ((left + right - 1) / 2, (top + bottom - 1) / 2)
            text = axes.text(*place, f"{grid[row, column]:.2f}", ha="center", va="center", fontsize=9)
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def to_bytes(picture: Float[np.ndarray, "height width 3"], scale: int = 1) -> UInt8[np.ndarray, "high wide 3"]:
    """A picture in 0..1 as a film's frame, each pixel `scale` × `scale` large."""
    frame = np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)
