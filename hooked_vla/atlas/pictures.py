"""What a worker does for heat maps on camera images: images of an episode's plans, and where tokens stand in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hooked_vla.analysis.attention import camera_views
from hooked_vla.atlas.policies import load_checked
from hooked_vla.atlas.replays import again
from hooked_vla.atlas.worker import Cancelled, Emit, WorkError
from hooked_vla.folders import new_folder
from hooked_vla.inputs import Observation
from hooked_vla.rollouts.records import read_manifest


def pictures(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """Run an episode again, and keep what its policy saw at some steps.

    arguments: folder, episode, steps, out: the folder that appears, complete, with STEP-CAMERA-NUMBER.png and
    pictures.json, which says what is in it.
    Raises as `again`, where the episode cannot be shown.
    """
    out = Path(arguments["out"])
    found = again(Path(arguments["folder"]), arguments["episode"], None)
    steps = [step for step in arguments["steps"] if step < len(found)]
    about = {"cameras": list(found.images), "steps": steps}
    with new_folder(out) as making:
        for i, camera in enumerate(found.images):
            for step in steps:
                Image.fromarray(found.images[camera][step]).save(making / f"{step}-{i}.png")
        (making / "pictures.json").write_text(json.dumps(about))
    return about


def grids(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> list[dict[str, Any]]:
    """Where a model's image tokens stand in the cameras' images. arguments: folder of rollouts; tower: of the tokens
    inside the vision tower.

    One entry a camera: camera (of the token segment), source (of the rollouts); grid; rows, columns: where each begins
    and ends, as shares of the image, None for one that shows nothing; n_before: tokens before the grid; order: place in
    the grid of each token. Raises WorkError where that is not known.
    """
    manifest = read_manifest(arguments["folder"])
    model, settings = load_checked(manifest["model"]), manifest["settings"]
    size = settings["image_size"]
    pixels = {name: np.zeros((size, size, 3), np.uint8) for name in settings["cameras"]}
    obs = Observation(pixels, np.zeros(manifest["suite"]["d_state"], np.float32), "")
    try:
        views = camera_views(model, obs, arguments["tower"])
    except (TypeError, ValueError) as error:
        raise WorkError(f"where this model's tokens stand in the picture is not known: {error}") from error
    return [
        {"camera": view.camera, "source": settings["cameras"][view.source], "grid": list(view.grid),
         "rows": spans(view.row_of, view.grid[0]), "columns": spans(view.column_of, view.grid[1]),
         "n_before": view.n_before, "order": view.order.tolist()}
        for view in views.values()
    ]  # fmt: skip


def spans(of: np.ndarray, n: int) -> list[list[float] | None]:
    """Where each of n cells begins and ends along an axis, as shares of it; None for one that shows nothing."""
    found: list[list[float] | None] = []
    for cell in range(n):
        inside = np.flatnonzero(of == cell)
        found.append([inside[0] / len(of), (inside[-1] + 1) / len(of)] if len(inside) else None)
    return found
