"""Films of episodes: made by replay when they are first asked for, and kept in the user's cache, so many bytes of them.

Made in a worker, one at a time and within a time limit. Where an episode cannot be replayed, because its simulator is
not there or it does not come out as it was recorded, the answer says why in place of a film.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import Media, NotThere, Route
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.episode_index import EpisodeIndex, episode_number, find_rollout
from hooked_vla.atlas.views.episodes import exported_episodes
from hooked_vla.atlas.views.replayed import fair, made_folder
from hooked_vla.atlas.worker import WorkError
from hooked_vla.folders import stamp

FILM_S = 180.0
MAX_BYTES = 2 * 2**30
# side of a film's pictures: the policy may see smaller ones
SIZE = 256
# films that an export holds, of a folder of rollouts and of a whole run: each takes about a second to make
EXPORTED, EXPORTED_IN_ALL = 12, 160
_ABOUT = "film.json"


def get_film(run: Run, rollout: str, episode: str) -> dict[str, Any]:
    """Which films of an episode there are; the first who asks waits for them.

    {"cameras": [...], "fps", "n_frames", "size", "error": None}: frame i is what was seen before step i. "error" says
    why there are none.
    Raises NotThere for an episode that is not recorded.
    """
    try:
        return _made(run, rollout, episode)[1] | {"error": None}
    except WorkError as error:
        return {"cameras": [], "error": str(error)}


def get_video(run: Run, rollout: str, episode: str, camera: str) -> Media:
    """One of its films, by its number. Raises NotThere."""
    try:
        folder, about = _made(run, rollout, episode)
    except WorkError as error:
        raise NotThere(str(error)) from error
    n = len(about["cameras"])
    if not (camera.isascii() and camera.isdecimal() and len(camera) < 4 and int(camera) < n):
        raise NotThere(f"no camera {camera!r}; there are {n}")
    return Media((folder / f"{int(camera)}.mp4").read_bytes(), "video/mp4")


def _made(run: Run, rollout: str, episode: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an episode's films, made now if need be, and what is in it. Raises NotThere, WorkError."""
    folder, number = find_rollout(run, rollout), episode_number(episode)
    index = EpisodeIndex.of(run, rollout)
    steps, row = index.episode_file("steps", number), index.episode_file("episodes", number)
    if steps is None or row is None:
        raise NotThere(f"episode {number} is not recorded in {run.shown(folder.path)}")
    stamps = [stamp(each) for each in (steps, row, folder.path / "manifest.json")]
    name = hashlib.sha256(repr((rollout, number, stamps, SIZE)).encode()).hexdigest()[:32]
    out = run.cache / "films" / name
    asked = {"folder": str(folder.path), "episode": number, "image_size": SIZE}
    return made_folder(run, "film", out, _ABOUT, asked, FILM_S, MAX_BYTES)


def exported_films(run: Run) -> Iterator[dict[str, str]]:
    """The first episodes of every folder that an export holds, EXPORTED of each at most and EXPORTED_IN_ALL in all."""
    folders = groupby(exported_episodes(run, EXPORTED), itemgetter("rollout"))
    return fair((episodes for _, episodes in folders), EXPORTED_IN_ALL)


def _exported_videos(run: Run) -> Iterator[dict[str, str]]:
    for each in exported_films(run):
        for camera in range(len(get_film(run, **each)["cameras"])):
            yield {**each, "camera": str(camera)}


ROUTES = [
    Route("rollouts/{rollout}/episode/{episode}/film", get_film, listing=exported_films, replays=True),
    Route("rollouts/{rollout}/episode/{episode}/video/{camera}", get_video, listing=_exported_videos,
          media="video/mp4", replays=True),
]  # fmt: skip
