"""The image battery: pictures keep size and type, strength 0 is the picture itself, and geometry moves as it says."""

import numpy as np
import pytest

from hooked_vla.rollouts.batteries.images import GEOMETRIC, IMAGE_KINDS, PHOTOMETRIC, REMOVAL, change_image

GRADED = [kind for kind, each in IMAGE_KINDS.items() if each.graded]


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours with a bright mark off the middle."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([60 + x, 150 - y, 90 + (x + y) // 2], -1).astype(np.uint8)
    image[8:14, 40:48] = (250, 20, 30)
    return image


def mark(image: np.ndarray) -> tuple[float, float]:
    """Centre (x, y) of what is red and bright."""
    y, x = np.nonzero((image[..., 0].astype(int) - image[..., 1] > 120) & (image[..., 0] > 180))
    return float(x.mean()), float(y.mean())


def test_there_are_24_kinds_in_three_groups() -> None:
    groups = [each.group for each in IMAGE_KINDS.values()]
    assert len(groups) == 24
    assert {group: groups.count(group) for group in groups} == {PHOTOMETRIC: 12, GEOMETRIC: 10, REMOVAL: 2}


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_picture_stays_a_picture_and_the_original_stays_as_it_is(kind: str) -> None:
    image = picture()
    before = image.copy()
    changed = change_image(kind, image, seed=(1, 2))
    assert changed.dtype == np.uint8 and changed.shape == image.shape and changed.flags.c_contiguous
    assert np.array_equal(image, before) and not np.shares_memory(changed, image)
    assert (changed != image).mean() > 0.04
    assert np.array_equal(changed, change_image(kind, image, seed=(1, 2)))


@pytest.mark.parametrize("kind", GRADED)
def test_strength_goes_from_nothing_to_much(kind: str) -> None:
    image = picture()
    assert np.array_equal(change_image(kind, image, 0.0), image)
    change = [np.abs(change_image(kind, image, s, seed=4).astype(int) - image).mean() for s in (0.3, 1.0, 1.6)]
    assert 0 < change[0] < change[1] <= change[2] or (kind == "hue" and 0 < change[0] < change[1])


def test_photometric_kinds_leave_places_alone_and_geometric_ones_do_not() -> None:
    image = picture()
    for kind, each in IMAGE_KINDS.items():
        if each.group == PHOTOMETRIC and kind in ("brightness_up", "contrast_up", "gamma", "blur", "colour_cast"):
            assert mark(change_image(kind, image)) == pytest.approx(mark(image), abs=0.6), kind
        if each.group == GEOMETRIC:
            assert np.abs(np.subtract(mark(change_image(kind, image)), mark(image))).max() > 1.5, kind


def test_exact_turns_and_flips() -> None:
    square = picture(48, 48)
    assert np.array_equal(change_image("horizontal_flip", square), square[:, ::-1])
    assert np.array_equal(change_image("vertical_flip", square), square[::-1])
    assert np.array_equal(change_image("rotate_90", square), np.rot90(square))
    assert np.array_equal(change_image("rotate_180", square), square[::-1, ::-1])
    wide = picture()
    assert np.array_equal(change_image("rotate_180", wide), wide[::-1, ::-1])


def test_geometry_moves_places_by_its_numbers() -> None:
    image = picture(96, 96)
    x, y = mark(image)
    half = 95 / 2
    assert mark(change_image("translate", image)) == pytest.approx((x + 0.3 * half, y), abs=0.3)
    assert mark(change_image("zoom_out", image)) == pytest.approx(
        (half + (x - half) / 1.3, half + (y - half) / 1.3), abs=0.3
    )
    assert mark(change_image("shear", image)) == pytest.approx((x + 0.2 * (y - half), y), abs=0.3)
    angle = np.radians(10)
    turned = (np.cos(angle) * (x - half) + np.sin(angle) * (y - half) + half,
              -np.sin(angle) * (x - half) + np.cos(angle) * (y - half) + half)  # fmt: skip
    assert mark(change_image("rotate_10", image)) == pytest.approx(turned, abs=0.3)


def test_a_turned_picture_that_is_not_square_is_not_stretched() -> None:
    image = np.full((40, 80, 3), 100, np.uint8)
    image[18:22, 30:50] = (250, 20, 30)
    turned = change_image("rotate_90", image)
    y, x = np.nonzero(turned[..., 0] > 200)
    assert (np.ptp(y) + 1, np.ptp(x) + 1) == (20, 4)


def test_photometric_numbers() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    # 0.3 of 255 is 76.5, which may be rounded either way
    assert change_image("brightness_up", grey)[0, 0] == pytest.approx([176.5] * 3, abs=0.5)
    assert change_image("brightness_down", grey)[0, 0] == pytest.approx([23.5] * 3, abs=0.5)
    assert change_image("gamma", grey)[0, 0, 0] == round((100 / 255) ** 1.8 * 255)
    assert change_image("colour_cast", grey)[0, 0].tolist() == [125, 100, 75]
    assert np.unique(change_image("posterize", picture())).size <= 8
    gray = change_image("grayscale", picture())
    assert np.ptp(gray.astype(int), axis=-1).max() == 0
    red = np.zeros((32, 32, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    assert change_image("hue", red)[0, 0].tolist() == [200, 200, 0]
    noise = change_image("noise", np.full((96, 96, 3), 128, np.uint8)).astype(float)
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.03) and noise.mean() == pytest.approx(128, abs=0.5)
    salted = change_image("salt_and_pepper", np.full((96, 96, 3), 128, np.uint8))
    assert (salted == 0).all(-1).mean() == pytest.approx(0.025, abs=0.01)
    assert (salted == 255).all(-1).mean() == pytest.approx(0.025, abs=0.01)
    assert (change_image("occlude", grey) == 128).all(-1).mean() == 0.25
    assert (change_image("blank", grey) == 128).all()


def test_noise_follows_the_seed() -> None:
    image = picture()
    assert not np.array_equal(change_image("noise", image, seed=(1, 0)), change_image("noise", image, seed=(1, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("melt", picture()), r"unknown kind 'melt' of image change; kinds: \['brightness_up'"),
        (("noise", picture(), -1.0), "noise: the strength must be a number from 0, got -1"),
        (("noise", picture()[..., :1]), r"must be uint8 \[H W 3\], got uint8 \[48, 64, 1\]"),
        (("blank", picture(), 0.5), "blank knows no degrees: its strength is 1, got 0.5"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_image(*arguments)
