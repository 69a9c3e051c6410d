"""What a worker does for maps of attention: an episode is run again, and its model plans once more at one of its steps.

The plan is compared with the recorded actions: a map of a run that cannot be made again would be of another run.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vla.analysis.attention import CameraView, camera_attention, camera_views
from hooked_vla.atlas.pictures import spans
from hooked_vla.atlas.policies import data_url, load_checked
from hooked_vla.atlas.rebuilt_arms import rebuild
from hooked_vla.atlas.replays import again, suite_of
from hooked_vla.atlas.worker import Cancelled, Emit, WorkError
from hooked_vla.folders import stamp
from hooked_vla.hooks.cache import ActivationCache
from hooked_vla.hooks.kept import kept
from hooked_vla.hooks.names import leaf
from hooked_vla.inputs import PAD, Observation, StepInputs
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.arms import Arm, ObservingArm
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.records import read_manifest
from hooked_vla.rollouts.replay import Episode
from hooked_vla.rollouts.settings import Settings, constant_text, torch_threads
from hooked_vla.vla import HookedVLA

# replays that are kept, and their pictures' bytes
_KEPT, _KEPT_BYTES = 4, 256 * 2**20
# of the patterns of one answer
_MAX_CACHE = 2 * 2**30
_DIGITS = 5
# where cameras' tokens stand, of one model: to find it out takes longer than a forward pass
_VIEWS: dict[Any, tuple[HookedVLA, dict[str, CameraView]]] = {}
_REPLAYS: "OrderedDict[tuple[str, int, int, int], Episode]" = OrderedDict()


@torch.no_grad()
def attend(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """Attention at the plan from which an environment step's action came.

    arguments: folder, episode, step; site, queries: both empty for what there is to choose from, else a hook_pattern
    and a token segment ("all": every token but padding).
    Raises WorkError, saying why, where there is none.
    """
    folder, number = Path(arguments["folder"]), int(arguments["episode"])
    manifest = read_manifest(folder)
    settings = Settings(**manifest["settings"])
    with torch_threads(settings.threads):
        model = load_checked(manifest["model"])
        episode = _replayed(folder, number)
        sites = _sites(model)
        if not sites:
            raise WorkError(f"{manifest['model']['name']!r} has no attention between tokens")
        site = arguments["site"] or next((name for name in sites if model.hook_points[name].reaches_action), sites[0])
        if site not in sites:
            raise WorkError(f"{site!r} is no attention between tokens of this model; there is {sites}")
        plan = _Plan(model, settings, manifest, episode, min(int(arguments["step"]), len(episode) - 1))
        cache_ = plan.run(site)
        if arguments["site"]:
            return plan.about() | _maps(plan, cache_, site, arguments["queries"])
        return plan.about() | {"sites": [_about_site(model, cache_, each) for each in sites], "site": site,
                               "cameras": plan.cameras()}  # fmt: skip


class _Plan:
    """One forward pass of an episode's model, as it was when the episode ran."""

    def __init__(
        self, model: HookedVLA, settings: Settings, manifest: Mapping[str, Any], episode: Episode, step: int
    ) -> None:
        self.model, self.settings, self.episode = model, settings, episode
        self.at = step - step % settings.n_action_steps
        self.cell = Cell(episode.number, episode.about["arm"], episode.about["task"], episode.about["seed"])
        described = manifest["arms"].get(self.cell.arm, {})
        self.arm, self.why_not = rebuild(self.cell.arm, described, suite_of(manifest))
        self.frame = self._seen(self.at)
        self.apart = float("nan")

    def run(self, site: str) -> ActivationCache:
        """Plans again; what the site held."""
        model, n_seen = self.model, self.model.spec.features.n_obs_steps
        arm: Arm | None = self.arm
        with constant_text(model.processor, self.settings.constant_text):
            frames = deque((self._seen(max(0, self.at - i)) for i in range(n_seen - 1, -1, -1)), maxlen=n_seen)
            *history, inputs = (prepare(model, self.settings, [frame]) for frame in frames)
            if isinstance(inputs, StepInputs) and history:
                inputs = inputs.follow(history)  # pyright: ignore[reportArgumentType]
            noise = SeededNoise.of(model, inputs)([self.cell.seed], self.at)
            hooks = list(arm.hooks([self.cell])) if arm is not None else []
            with kept(model.run_state, "env_step"), model.hooks(hooks):
                model.run_state.env_step = self.at
                actions, found = model.run_with_cache(
                    inputs, [site], noise, unnorm_key=self.settings.unnorm_key, max_bytes=_MAX_CACHE
                )
        assert actions is not None
        planned = actions.chunk[0, : self.settings.n_action_steps].float().cpu().numpy()
        taken = self.episode.actions[self.at : self.at + len(planned)]
        self.apart = float(np.abs(planned[: len(taken)] - taken).max())
        return found

    def about(self) -> dict[str, Any]:
        """What the maps are of. apart: how far the plan is from the recorded actions; edits: whether the arm's edits
        acted, and why not."""
        return {"step": self.at, "n_action_steps": self.settings.n_action_steps, "apart": self.apart,
                "edits": {"applied": self.arm is not None, "why": self.why_not}}  # fmt: skip

    def cameras(self) -> list[dict[str, Any]]:
        """The pictures that the policy saw, and which part of them each row and column of tokens shows, in shares."""
        return [
            {"camera": view.camera, "image": data_url(self.frame["pixels"][self.settings.cameras[view.source]]),
             "rows": spans(view.row_of, view.grid[0]), "columns": spans(view.column_of, view.grid[1])}
            for view in self.views(False).values()
        ]  # fmt: skip

    def views(self, tower: bool) -> dict[str, CameraView]:
        """Where the cameras' tokens are. Raises WorkError for a model whose geometry is not known."""
        pixels = {name: np.asarray(self.frame["pixels"][source]) for name, source in self.settings.cameras.items()}
        obs = Observation(pixels, np.asarray(self.frame["state"]), self.frame["instruction"])
        key = (tower, tuple((name, image.shape) for name, image in pixels.items()))
        if key in _VIEWS and _VIEWS[key][0] is self.model:
            return _VIEWS[key][1]
        try:
            found = camera_views(self.model, obs, tower)
            if any(model is not self.model for model, _ in _VIEWS.values()):
                _VIEWS.clear()
            _VIEWS[key] = self.model, found
            return found
        except (TypeError, ValueError) as error:
            raise WorkError(f"where this model's tokens stand in the picture is not known: {error}") from error

    def _seen(self, step: int) -> Mapping[str, Any]:
        """What the policy saw at a step, as its arm changed it."""
        frame = {
            "pixels": {camera: images[step] for camera, images in self.episode.images.items()},
            "state": self.episode.states[step],
            "instruction": self.episode.instruction,
        }
        return self.arm.observe(self.cell, step, frame) if isinstance(self.arm, ObservingArm) else frame


def _maps(plan: _Plan, found: ActivationCache, site: str, queries: str) -> dict[str, Any]:
    """Weights by camera, denoise step and head, each a grid; uniform: what even attention would give."""
    tower = _rows_are_images(found, site)
    asked = None if queries in ("", "all") else queries
    if tower and asked is not None:
        raise WorkError(f"{site} is inside the vision tower, where all patches ask")
    cameras = []
    for view in plan.views(tower).values():
        try:
            seen = camera_attention(found, site, view, asked)
        except ValueError as error:
            raise WorkError(str(error)) from error
        cameras.append({"camera": view.camera, "grid": list(view.grid), "weights": _plain(seen.weights[0]),
                        "uniform": _plain(seen.uniform[0]), "share": _plain(seen.share[0]),
                        "rows": spans(view.row_of, view.grid[0]),
                        "columns": spans(view.column_of, view.grid[1])})  # fmt: skip
    return {"site": site, "queries": queries or "all", "maps": cameras}


def _sites(model: HookedVLA) -> list[str]:
    return [
        name for name, site in model.hook_points.items()
        if leaf(name) == "hook_pattern" and {"query", "key"} <= set(site.axes) and "window" not in site.axes
    ]  # fmt: skip


def _about_site(model: HookedVLA, found: ActivationCache, site: str) -> dict[str, Any]:
    known = model.hook_points[site]
    point = model.points[site]
    asking = found.segments[point.streams["query"]]
    tower = asking.row_axis == "image"
    # keys without a camera's tokens have no map
    seen = any(name.startswith("image") for name in found.segments[point.streams["key"]].present())
    return {"site": site, "pathway": known.pathway, "n_heads": int(known.shape[known.axes.index("n_heads")]),
            "n_steps": model.n_denoise_steps if known.denoised and not point.per_chunk else 1,
            "reaches_action": known.reaches_action, "sees": seen,
            "queries": ["all"] + ([] if tower else [each for each in asking.present() if each != PAD])}  # fmt: skip


def _rows_are_images(found: ActivationCache, site: str) -> bool:
    entry = found.entries[found[site].site]
    return found.segments[entry.streams["key"]].row_axis == "image"


def _replayed(folder: Path, number: int) -> Episode:
    """The episode with the policy's own pictures; the last few are kept."""
    # another run may be recorded in the same place
    key = (str(folder), number, *stamp(folder / "manifest.json"))
    if key in _REPLAYS:
        _REPLAYS.move_to_end(key)
        return _REPLAYS[key]
    found = again(folder, number, None)
    if sum(images.nbytes for images in found.images.values()) <= _KEPT_BYTES:
        _REPLAYS[key] = found
        while len(_REPLAYS) > _KEPT:
            _REPLAYS.popitem(last=False)
    return found


def _plain(values: Tensor) -> Any:
    rounded = np.round(values.double().cpu().numpy(), _DIGITS)
    return np.where(np.isfinite(rounded), rounded, 0).tolist()
