"""Resizing of bytes: what must hold whatever the sizes."""

import pytest
import torch
from torch import Tensor

from hooked_vla.processors.resize import area_shortest_edge, bicubic, center_crop, letterbox, whole_tokens

SIZES = [(8, 8), (30, 47), (64, 20)]


def images(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_one_colour_stays_that_colour(size: tuple[int, int]) -> None:
    plain = torch.full((1, 3, *size), 137, dtype=torch.uint8)
    for resized in (bicubic(plain, (12, 40)), area_shortest_edge(plain, 12), area_shortest_edge(plain, 70)):
        assert (resized == 137).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_same_size_changes_nothing(size: tuple[int, int]) -> None:
    original = images(*size)
    assert torch.equal(bicubic(original, size), original)
    assert torch.equal(area_shortest_edge(original, min(size)), original)
    assert torch.equal(center_crop(original, 1.0, floor=True), original)


def test_area_averages_whole_blocks() -> None:
    original = images(12, 18)
    blocks = original.float().unflatten(3, (6, 3)).unflatten(2, (4, 3)).mean((3, 5))
    assert (area_shortest_edge(original, 4).float() - blocks).abs().max() <= 0.5


def test_letterbox_and_crop_keep_the_middle() -> None:
    original = images(5, 8)
    square = letterbox(original)
    assert square.shape[-2:] == (8, 8)
    assert torch.equal(square[:, :, 1:6], original) and not square[:, :, 6:].any() and not square[:, :, :1].any()
    assert torch.equal(center_crop(original, 0.7, floor=True), original[:, :, 1:4, 1:6])
    assert torch.equal(center_crop(original, 0.7, floor=False), original[:, :, 0:4, 1:7])


@pytest.mark.parametrize(("size", "bounds", "expected"), [
    ((256, 256), (65_536, 16_777_216), (256, 256)),
    ((256, 341), (65_536, 16_777_216), (256, 352)),
    ((48, 80), (65_536, 16_777_216), (224, 352)),
    ((1000, 3000), (65_536, 500_000), (384, 1216)),
])  # fmt: skip
def test_sides_are_whole_tokens_within_bounds(
    size: tuple[int, int], bounds: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert whole_tokens(size, 32, bounds) == expected
