"""What a worker does with recorded episodes: runs them again for their images, as films or step by step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooked_vla.atlas.worker import Cancelled, Emit, Refused, WorkError
from hooked_vla.folders import new_folder
from hooked_vla.rollouts.experiments.kinds.injection_moved import moved_suite
from hooked_vla.rollouts.records import read_manifest
from hooked_vla.rollouts.replay import Episode, ReplayError, replay
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.video import Film

# x264's scale (video.QUALITY): the pictures are small, and looked at enlarged
_QUALITY = 20
# every so many frames one that a browser can jump to
_EVERY = 10
# of one replay in memory
_MAX_BYTES = 2 * 2**30
_MOVED = "-moved"


def suite_of(manifest: Mapping[str, Any]) -> Suite:
    """The suite that a run acted in, those of experiments included.

    Raises ValueError for an unknown one, ModuleNotFoundError where its simulator is not installed.
    """
    name = manifest["suite"]["name"]
    return moved_suite(name.removesuffix(_MOVED)) if name.endswith(_MOVED) else get_suite(name)


def again(folder: Path, episode: int, image_size: int | None) -> Episode:
    """A recorded episode with its images. image_size: None for that of the policy.

    Raises Refused, saying why, where it cannot be shown, and WorkError for what may pass: no memory, a file that
    cannot be opened now.
    """
    manifest = read_manifest(folder)
    try:
        suite = suite_of(manifest)
        cameras = list(dict.fromkeys(manifest["settings"]["cameras"].values())) or list(suite.cameras)
        size = image_size or manifest["settings"]["image_size"]
        n = manifest["settings"]["max_steps"] * len(cameras) * size * size * 3
        if n > _MAX_BYTES:
            raise ValueError(f"{manifest['settings']['max_steps']} steps of {len(cameras)} cameras at {size} pixels")
        return next(replay(folder, [episode], cameras, image_size, suite))
    except ModuleNotFoundError as error:
        raise Refused(f"the simulator of the suite {manifest['suite']['name']!r} is not installed: {error}") from error
    except Exception as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        text = text or type(error).__name__
        lasts = isinstance(error, ValueError | LookupError | ReplayError)
        raise (Refused if lasts else WorkError)(f"the replay does not show the episode: {text}") from error


def ready(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> None:
    """Nothing: that it was asked for has begun the process and its imports."""


def film(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """Films of all cameras of an episode, each with what was seen before every step and after the last.

    arguments: folder, episode, image_size, out: the folder that appears, complete, with CAMERA-NUMBER.mp4 and
    film.json, which says what is in it.
    """
    out = Path(arguments["out"])
    found = again(Path(arguments["folder"]), arguments["episode"], arguments["image_size"])
    about = {"cameras": list(found.images), "fps": found.fps, "n_frames": len(found) + 1,
             "size": arguments["image_size"]}  # fmt: skip
    with new_folder(out) as making:
        for i, camera in enumerate(found.images):
            with Film(making / f"{i}.mp4", found.fps, _QUALITY, _EVERY) as film:
                for image in found.images[camera]:
                    film.add(image)
                film.add(found.last_images[camera])
        (making / "film.json").write_text(json.dumps(about))
    return about
