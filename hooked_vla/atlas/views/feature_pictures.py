"""Camera images of the plans in which features are active, by replay, and where image tokens stand in them."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import Media, NotThere, Route
from hooked_vla.atlas.run import RolloutFolder, Run
from hooked_vla.atlas.views.features import exported_features, get_feature
from hooked_vla.atlas.views.opened_index import reading, rollouts_of, whole
from hooked_vla.atlas.views.replayed import made_folder, replays
from hooked_vla.atlas.worker import WorkError
from hooked_vla.folders import stamp, write_json
from hooked_vla.rollouts.sae.feature_index import FeatureIndex

_PICTURES_S, _GRIDS_S = 180.0, 120.0
# those of one episode take about half a megabyte
MAX_BYTES = 2**30
# episodes whose pictures an export holds, of each index
EXPORTED_EPISODES = 60
_ABOUT = "pictures.json"
_NONE = (
    "the episodes of these activations are not in this run: open a folder that holds the store's rollouts beside the "
    "index"
)


def get_pictures(run: Run, index: str, episode: str) -> dict[str, Any]:
    """What pictures of an episode's plans there are; the first who asks waits for them.

    {"cameras": [...], "steps": [...], "error": None}; "error" says why there are none. Raises NotThere.
    """
    try:
        with reading(run, index) as found:
            return _made(run, found, whole(episode, "episode"))[1] | {"error": None}
    except WorkError as error:
        return {"cameras": [], "steps": [], "error": str(error)}


def get_picture(run: Run, index: str, episode: str, step: str, camera: str) -> Media:
    """What a camera, by its number, showed the policy at a plan. Raises NotThere."""
    number, place = whole(camera, "camera"), whole(step, "step")
    try:
        with reading(run, index) as found:
            folder, about = _made(run, found, whole(episode, "episode"))
    except WorkError as error:
        raise NotThere(str(error)) from error
    if number >= len(about["cameras"]) or place not in about["steps"]:
        raise NotThere(f"no picture of camera {number} at step {place}")
    return Media((folder / f"{place}-{number}.png").read_bytes(), "image/png")


def get_grids(run: Run, index: str) -> dict[str, Any]:
    """Where the tokens of images stand in the pictures: {"grids": [...], "error": None}, see atlas/pictures.py.

    Raises NotThere.
    """
    with reading(run, index) as found:
        folder = rollouts_of(run, found)
        if folder is None:
            return {"grids": [], "error": _NONE}
        out = run.cache / "grids" / f"{_name(folder, found.site)}.json"
        if not out.is_file():
            asked = {"folder": str(folder.path), "tower": found.site.startswith("vision.")}
            try:
                write_json(out, replays(run).run("grids", asked, _GRIDS_S))
            except WorkError as error:
                return {"grids": [], "error": str(error)}
        return {"grids": json.loads(out.read_text()), "error": None}


def _made(run: Run, index: FeatureIndex, episode: int) -> tuple[Path, dict[str, Any]]:
    """The folder of an episode's pictures, made now if need be, and what is in it. Raises NotThere, WorkError."""
    folder = rollouts_of(run, index)
    if folder is None:
        raise WorkError(_NONE)
    steps = index.sql("SELECT env_step FROM frames WHERE episode = ? ORDER BY env_step", [episode])["env_step"].tolist()
    if not steps:
        raise NotThere(f"no episode {episode} in the index")
    asked = {"folder": str(folder.path), "episode": episode, "steps": steps}
    out = run.cache / "pictures" / _name(folder, episode, steps)
    return made_folder(run, "pictures", out, _ABOUT, asked, _PICTURES_S, MAX_BYTES)


def _name(folder: RolloutFolder, *parts: Any) -> str:
    """Of what is made of a folder of rollouts: another one where another run was recorded in its place."""
    told = repr((str(folder.path), stamp(folder.path / "manifest.json"), *parts))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _exported_episodes(run: Run) -> Iterator[dict[str, str]]:
    """Of each index, the episodes that the exported features' plans are of, the first EXPORTED_EPISODES."""
    features: dict[str, list[str]] = {}
    for each in exported_features(run):
        features.setdefault(each["index"], []).append(each["feature"])
    for key, numbers in features.items():
        with reading(run, key) as found:
            if rollouts_of(run, found) is None:
                continue
        plans = (
            plan for number in numbers for part in get_feature(run, key, number)["plans"].values() for plan in part
        )
        for episode in islice(dict.fromkeys(plan["episode"] for plan in plans), EXPORTED_EPISODES):
            yield {"index": key, "episode": str(episode)}


def _exported_pictures(run: Run) -> Iterator[dict[str, str]]:
    for each in _exported_episodes(run):
        about = get_pictures(run, **each)
        for step in about["steps"]:
            for camera in range(len(about["cameras"])):
                yield {**each, "step": str(step), "camera": str(camera)}


def _exported_grids(run: Run) -> Iterator[dict[str, str]]:
    for key in dict.fromkeys(each["index"] for each in exported_features(run)):
        yield {"index": key}


ROUTES = [
    Route("features/{index}/grids", get_grids, listing=_exported_grids, replays=True),
    Route("features/{index}/pictures/{episode}", get_pictures, listing=_exported_episodes, replays=True),
    Route("features/{index}/picture/{episode}/{step}/{camera}", get_picture, listing=_exported_pictures,
          media="image/png", replays=True),
]  # fmt: skip
