"""What is exported of a folder of rollouts, and how: as a LeRobot data set, for Rerun's viewer, or as films."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vla.rollouts.replay import Episode, replay

FORMATS = ("lerobot", "rerun", "mp4")


def export_run(
    folder: str | Path,
    to: str,
    out: str | Path,
    episodes: Sequence[int] | None = None,
    cameras: Sequence[str] | None = None,
    image_size: int | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
    **settings: Any,
) -> list[Path]:
    """Export recorded episodes; each is run again for its images and checked, see `replay`.

    to: "lerobot" (out is the data set's folder, which must not exist), "rerun" or "mp4" (out is a folder that gets one
    file an episode). on_episode: called after each. settings: of the format (see the writers) and of `replay`.
    Returns what was written.
    Raises ValueError for an unknown format, ModuleNotFoundError naming the extra where a package is missing,
    FileExistsError for a data set that is there already, and as `replay`.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; formats: {list(FORMATS)}")
    shared = {key: settings.pop(key) for key in ("suite", "tolerance") if key in settings}
    played = _told(replay(folder, episodes, cameras, image_size, **shared), on_episode)
    if to == "lerobot":
        from hooked_vla.rollouts.export_lerobot import write_lerobot

        return [write_lerobot(out, played, **settings)]
    if to == "rerun":
        from hooked_vla.rollouts.export_rerun import write_rerun

        return [write_rerun(Path(out) / f"episode-{each.number:09d}.rrd", each, **settings) for each in played]
    return [write_episode_film(Path(out) / f"episode-{each.number:09d}.mp4", each, **settings) for each in played]


def write_episode_film(path: str | Path, episode: Episode, **settings: Any) -> Path:
    """An episode's cameras side by side, its last observation at the end; settings: of Film.

    Raises ValueError for cameras of different heights, or none.
    """
    from hooked_vla.rollouts.video import write_film

    heights = {camera: images.shape[1] for camera, images in episode.images.items()}
    if len(set(heights.values())) != 1:
        raise ValueError(f"a film shows cameras of one height side by side, got {heights or 'no cameras'}")
    shown = [np.concatenate(frames, axis=1) for frames in zip(*episode.images.values(), strict=True)]
    shown.append(np.concatenate([episode.last_images[camera] for camera in episode.images], axis=1))
    write_film(path, shown, episode.fps, **settings)
    return Path(path)


def _told(episodes: Iterable[Episode], on_episode: Callable[[Episode], None]) -> Iterable[Episode]:
    for episode in episodes:
        yield episode
        on_episode(episode)
