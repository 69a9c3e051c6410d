"""Films of episodes: H.264 in mp4, through PyAV; the same frames give the same bytes."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8

from hooked_vla.extras import needs_packages

with needs_packages(("av",), "films need: pip install hooked-vla[sim]"):
    import av
    from av.error import FFmpegError

CODEC = "libx264"
# x264's scale: 0 is lossless, 18 can hardly be told from it, 51 is worst
QUALITY = 18
# H.264 stores colour at half the resolution, in the widely played profile only for even sides
_EVEN, _ODD = "yuv420p", "yuv444p"


class Film:
    """An mp4 that grows frame by frame, and appears under its name when closed without an exception.

    fps: frames a second; frame i is shown at i / fps. every: a frame that can be decoded by itself comes every so many.
    n_frames, n_bytes: written so far (bytes once they have left the encoder).
    """

    def __init__(self, path: str | Path, fps: int, quality: int = QUALITY, every: int = 50) -> None:
        """Raises ValueError for fps, quality or `every` outside their ranges."""
        if fps < 1 or every < 1 or not 0 <= quality <= 51:
            raise ValueError(f"fps and every are at least 1 and quality 0..51, got {fps}, {every}, {quality}")
        self.path, self.fps, self.quality, self.every = Path(path), fps, quality, every
        self.n_frames = self.n_bytes = 0
        self.size: tuple[int, int] | None = None
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._file: Any = None
        self._stream: Any = None

    def add(self, frame: np.ndarray) -> None:
        """The next frame, uint8 [height, width, 3].

        Raises TypeError or ValueError for a frame that is not an image, or of another size than those before it.
        """
        frame = np.asarray(frame)
        if frame.dtype != np.uint8:
            raise TypeError(f"{self.path.name}: frames are uint8 in 0..255, got {frame.dtype}")
        if frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
            raise ValueError(f"{self.path.name}: a frame is [height, width, 3], got {list(frame.shape)}")
        if self.size is None:
            self._open(frame.shape[0], frame.shape[1])
        if frame.shape[:2] != self.size:
            raise ValueError(f"{self.path.name}: frames are {self.size} pixels, got {frame.shape[:2]}")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self.n_frames, Fraction(1, self.fps)
        self._mux(self._stream.encode(picture))
        self.n_frames += 1

    def close(self) -> None:
        """Finish the file.

        Raises ValueError where no frame was added.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: a film needs at least one frame")
        self._mux(self._stream.encode())
        self._file.close()
        self._temporary.replace(self.path)

    def discard(self) -> None:
        """Leave nothing of it."""
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "Film":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.size = (height, width)
        self._file = av.open(str(self._temporary), "w", format="mp4")
        # no frames that refer to later ones: times then start at 0; few that wait in the encoder
        options = {"crf": str(self.quality), "g": str(self.every), "bf": "0", "rc-lookahead": "10"}
        stream = cast(Any, self._file.add_stream(CODEC, rate=self.fps, options=options))
        stream.height, stream.width = height, width
        stream.pix_fmt = pixel_format(height, width)
        stream.codec_context.time_base = Fraction(1, self.fps)
        stream.codec_context.thread_count = 1
        self._stream = stream

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            self.n_bytes += packet.size
            self._file.mux(packet)


def pixel_format(height: int, width: int) -> str:
    """How colours of films of this size are stored."""
    return _ODD if height % 2 or width % 2 else _EVEN


def write_film(path: str | Path, frames: Iterable[np.ndarray], fps: int, quality: int = QUALITY) -> None:
    """Write frames, uint8 [height, width, 3], as an mp4; the file appears when complete.

    Raises as Film; ValueError for no frames.
    """
    with Film(path, fps, quality) as film:
        for frame in frames:
            film.add(frame)


def read_film(path: str | Path) -> UInt8[np.ndarray, "frame height width 3"]:
    """All frames of a film.

    Raises FileNotFoundError where there is none, ValueError for a file that is not one.
    """
    try:
        with av.open(str(path)) as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    except FileNotFoundError:
        raise
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is truncated, or not a film: {error}") from error
