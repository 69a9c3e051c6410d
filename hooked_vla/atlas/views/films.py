"""Films of episodes: made by replay when they are first asked for, and kept in the user's cache, so many bytes of them.

Made in a worker, one at a time and within a time limit. Where an episode cannot be replayed, because its simulator is
not there or it does not come out as it was recorded, the answer says why in place of a film.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import Media, NotThere, Route
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.episode_index import EpisodeIndex, episode_number, find_rollout
from hooked_vla.atlas.views.episodes import exported_episodes
from hooked_vla.atlas.worker import Interrupted, Worker, WorkError

FILM_S = 180.0
MAX_BYTES = 2 * 2**30
# side of a film's pictures: the policy may see smaller ones
SIZE = 256
# films that an export holds, of a folder of rollouts and of a whole run: each takes about a second to make
EXPORTED, EXPORTED_IN_ALL = 12, 160
_ABOUT = "film.json"


def replays(run: Run) -> Worker:
    """The run's worker for replays: films, and attention."""
    return run.keep("replays", lambda: Worker("replay"))


def get_film(run: Run, rollout: str, episode: str) -> dict[str, Any]:
    """Which films of an episode there are; the first who asks waits for them.

    {"cameras": [...], "fps", "n_frames", "size", "error": None}: frame i is what was seen before step i. "error" says
    why there are none.
    Raises NotThere for an episode that is not recorded.
    """
    try:
        return _about(_made(run, rollout, episode)) | {"error": None}
    except WorkError as error:
        return {"cameras": [], "error": str(error)}


def get_video(run: Run, rollout: str, episode: str, camera: str) -> Media:
    """One of its films, by its number. Raises NotThere."""
    try:
        folder = _made(run, rollout, episode)
    except WorkError as error:
        raise NotThere(str(error)) from error
    n = len(_about(folder)["cameras"])
    if not (camera.isascii() and camera.isdecimal() and len(camera) < 4 and int(camera) < n):
        raise NotThere(f"no camera {camera!r}; there are {n}")
    return Media((folder / f"{int(camera)}.mp4").read_bytes(), "video/mp4")


def _made(run: Run, rollout: str, episode: str) -> Path:
    """The folder of an episode's films, made now if need be. Raises NotThere, WorkError."""
    folder, number = find_rollout(run, rollout), episode_number(episode)
    index = EpisodeIndex.of(run, rollout)
    steps, row = index.episode_file("steps", number), index.episode_file("episodes", number)
    if steps is None or row is None:
        raise NotThere(f"episode {number} is not recorded in {run.shown(folder.path)}")
    stamps = [(each.stat().st_mtime_ns, each.stat().st_size) for each in (steps, row, folder.path / "manifest.json")]
    name = hashlib.sha256(repr((rollout, number, stamps, SIZE)).encode()).hexdigest()[:32]
    out = run.cache / "films" / name
    failed = run.keep("failed films", dict[str, str])
    if name in failed:
        raise WorkError(failed[name])
    if not (out / _ABOUT).is_file():
        try:
            asked = {"folder": str(folder.path), "episode": number, "image_size": SIZE, "out": str(out)}
            replays(run).run("film", asked, FILM_S)
        except WorkError as error:
            # two that ask for the same film: the second finds it made
            if not (out / _ABOUT).is_file():
                if not isinstance(error, Interrupted):
                    failed[name] = str(error)
                raise
        _bound(out.parent, keep=out)
    with suppress(OSError):
        os.utime(out)
    return out


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _ABOUT).read_text())


def _bound(films: Path, keep: Path) -> None:
    """Remove the films that were looked at longest ago, until the others fit."""
    sizes = {}
    with suppress(OSError):
        for each in films.iterdir():
            sizes[each] = (each.stat().st_mtime, sum(file.stat().st_size for file in each.iterdir()))
    total = sum(size for _, size in sizes.values())
    for each in sorted(sizes, key=lambda one: sizes[one][0]):
        if total <= MAX_BYTES:
            return
        if each != keep:
            shutil.rmtree(each, ignore_errors=True)
            total -= sizes[each][1]


def exported_films(run: Run) -> Iterator[dict[str, str]]:
    """The first EXPORTED episodes of every folder that an export holds, EXPORTED_IN_ALL in all."""
    return islice(exported_episodes(run, EXPORTED), EXPORTED_IN_ALL)


def _exported_videos(run: Run) -> Iterator[dict[str, str]]:
    for each in exported_films(run):
        for camera in range(len(get_film(run, **each)["cameras"])):
            yield {**each, "camera": str(camera)}


ROUTES = [
    Route("rollouts/{rollout}/episode/{episode}/film", get_film, listing=exported_films, replays=True),
    Route("rollouts/{rollout}/episode/{episode}/video/{camera}", get_video, listing=_exported_videos,
          media="video/mp4", replays=True),
]  # fmt: skip
