"""Films: the frames that went in can be seen, at their times; nothing half-written."""

import av
import numpy as np
import pytest

from hooked_vla.rollouts.video import Film, read_film, write_film


def frames(n: int = 12, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves over a gradient."""
    made = []
    for i in range(n):
        frame = np.repeat(np.linspace(30, 120, width, dtype=np.uint8)[None, :, None], height, axis=0).repeat(3, axis=2)
        frame[10:30, 2 * i : 2 * i + 20] = (200, 60, 40)
        made.append(frame)
    return made


def rms(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.mean((first.astype(float) - second) ** 2)))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 51)])
def test_a_film_shows_its_frames(tmp_path, height, width):
    made = frames(height=height, width=width)
    write_film(tmp_path / "deep" / "a.mp4", made, fps=20)
    shown = read_film(tmp_path / "deep" / "a.mp4")
    assert shown.shape == (12, height, width, 3)
    # colour is stored at half the resolution, so edges differ a little; other frames differ by more
    assert max(rms(a, b) for a, b in zip(shown, made, strict=True)) < 12 < rms(shown[0], made[2])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.mp4"]


def test_frames_are_at_their_times_and_can_be_sought(tmp_path):
    with Film(tmp_path / "a.mp4", fps=30, every=2) as film:
        for frame in frames(7):
            film.add(frame)
        assert film.n_frames == 7
    with av.open(str(tmp_path / "a.mp4")) as file:
        shown = list(file.decode(video=0))
        assert [frame.time for frame in shown] == pytest.approx([i / 30 for i in range(7)], abs=1e-9)
        assert [i for i, frame in enumerate(shown) if frame.key_frame] == [0, 2, 4, 6]
        assert file.streams.video[0].codec_context.name == "h264"


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_film(tmp_path / f"{name}.mp4", frames(), fps=20)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_worse_quality_takes_less_room(tmp_path):
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    for quality in (10, 40):
        write_film(tmp_path / f"{quality}.mp4", noise, fps=5, quality=quality)
    assert (tmp_path / "40.mp4").stat().st_size < (tmp_path / "10.mp4").stat().st_size / 2


def test_wrong_frames_are_refused_and_nothing_is_left(tmp_path):
    good = frames(1)[0]
    for wrong, error, message in (
        ([good, good[:20]], ValueError, r"frames are \(48, 64\) pixels, got \(20, 64\)"),
        ([good / 255], TypeError, "frames are uint8 in 0..255, got float64"),
        ([good[..., 0]], ValueError, r"a frame is \[height, width, 3\], got \[48, 64\]"),
        ([good[:0]], ValueError, r"got \[0, 64, 3\]"),
        ([], ValueError, "a film needs at least one frame"),
    ):
        with pytest.raises(error, match=message):
            write_film(tmp_path / "a.mp4", wrong, fps=20)
        assert not [*tmp_path.iterdir()]
    for settings in ({"fps": 0}, {"fps": 5, "every": 0}, {"fps": 5, "quality": 60}):
        with pytest.raises(ValueError, match="quality 0..51"):
            Film(tmp_path / "a.mp4", **settings)


def test_an_older_film_stays_until_the_new_one_is_complete(tmp_path):
    write_film(tmp_path / "a.mp4", frames(3), fps=20)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ArithmeticError), Film(tmp_path / "a.mp4", fps=20) as film:
        film.add(frames(1)[0])
        raise ArithmeticError
    assert (tmp_path / "a.mp4").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_what_is_no_film_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"a.mp4 is truncated, or not a film"):
        read_film(tmp_path / "a.mp4")
    write_film(tmp_path / "b.mp4", frames(), fps=20)
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        read_film(tmp_path / "b.mp4")
    with pytest.raises(FileNotFoundError):
        read_film(tmp_path / "c.mp4")
