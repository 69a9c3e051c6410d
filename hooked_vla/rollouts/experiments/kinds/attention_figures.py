"""Overlays of attention on camera images, scores by layer and head, and films of attention over episodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from hooked_vla.analysis.attention import CameraView, camera_views
from hooked_vla.analysis.attention_figures import COLOURS as MAP
from hooked_vla.analysis.attention_figures import draw_overlay, overlay, to_bytes
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import HookPoint
from hooked_vla.hooks.model import HookRequest
from hooked_vla.inputs import Observation
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map, new_figure
from hooked_vla.rollouts.experiments.kinds.attention_maps import APPROACH, CARRY, Chosen, Maps
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.settings import settle
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.video import Film

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure

OUTLINE = "#00ff66"
# attention at this many times the uniform share is drawn in the strongest colour of a picture, and of a film
_MOST = 5.0
_FILM_REACH = 3.0
_FILM_SCALE = 3


def draw_maps(maps: Maps, chosen: Sequence[Chosen], camera: str, reads_words: bool = True) -> tuple[Figure, str]:
    """Chosen maps over the camera's image, at both moments of the first scene that has them; the target is outlined."""
    view = maps.views[camera]
    seeds = {each.seed for each in maps.moments if each.phase == CARRY}
    shown = [
        next(i for i, each in enumerate(maps.moments) if each.phase == phase and (each.seed in seeds or not seeds))
        for phase in ((APPROACH, CARRY) if seeds else (APPROACH,))
    ]
    grids = {
        (i, each): _relative(maps.weights[each.reader, each.site, camera][i].mean(0), each.head)
        for i in shown for each in chosen
    }  # fmt: skip
    # one scale for all panels: the same colour is the same number
    norm = TwoSlopeNorm(1.0, 0.0, min(_MOST, max(float(grid.max()) for grid in grids.values())))
    figure = new_figure(2.9 + 2.3 * len(chosen), 0.9 + 2.5 * len(shown))
    panels = figure.subplots(len(shown), 1 + len(chosen), squeeze=False)
    for row, i in zip(panels, shown, strict=True):
        moment = maps.moments[i]
        target = moment.masks[camera][moment.target]
        row[0].imshow(moment.images[camera])
        row[0].contour(target.astype(float), levels=[0.5], colors=OUTLINE, linewidths=1.5)
        row[0].set_ylabel(f"{moment.phase}: {moment.target}", fontsize=9)
        row[0].set_xticks([])
        row[0].set_yticks([])
        for axes, each in zip(row[1:], chosen, strict=True):
            draw_overlay(axes, moment.images[camera], grids[i, each], view, norm, [(target, OUTLINE)])
    for axes, each in zip(panels[0, 1:], chosen, strict=True):
        axes.set_title(f"{each.label}\n{each.reader}\n{each.what}", fontsize=8)
    scale = ScalarMappable(norm, MAP)
    figure.colorbar(scale, ax=panels, shrink=0.8, spacing="proportional", extend="max").set_label(
        "attention, 1 is the mean of the camera's tokens", fontsize=8
    )
    first = maps.moments[shown[0]]
    figure.suptitle(f"“{first.instruction}”" if reads_words else f"task {first.task} (no words are read)", fontsize=10)
    caption = (
        f"Attention to the {camera} camera's tokens, as multiples of their mean: red more, blue less, on one scale for "
        f"all panels, whose end is at most {_MOST:g}. The target is outlined."
    )
    return figure, caption


def _relative(weights: Tensor, head: int) -> np.ndarray:
    """One head's map (-1: the mean of all), as multiples of its mean over the camera's tokens."""
    grid = weights.mean(0) if head < 0 else weights[head]
    return (grid / grid.mean()).numpy()


def draw_scores(heads: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Mean score of every head by layer, one figure a reader; chance is white."""
    figures = {}
    for reader, part in heads.groupby("reader", sort=False):
        part = part.assign(
            block=[
                f"{'' if live else 'dead end: '}{site.split('.', 1)[1].rsplit('.', 1)[0]}"
                for site, live in zip(part["site"], part["reaches_action"], strict=True)
            ]
        )
        figure = heat_map(part, "block", "head", "target", title=str(reader), unit="score on the target, 1 is chance",
                          centre=1.0)  # fmt: skip
        name = "heads_" + "".join(c if c.isalnum() else "_" for c in str(reader))
        figures[name] = (figure, f"{reader}: how much more attention the target gets than its pixels' share, by head.")
    return figures


def film(context: Context, suite: str, n: int, chosen: Sequence[Chosen]) -> list[str]:
    """Films of `n` baseline episodes: the first camera's image, and beside it each chosen head's latest map.

    Maps are of the last denoise step, and of all words. Returns the films' paths in the run's folder. Episodes that are
    recorded already are not filmed again.
    """
    if not n or not chosen:
        return []
    watcher = AttentionFilm(context, suite, chosen)
    context.rollouts("filmed", suite, (BASELINE,), n, watchers=[watcher])
    return sorted(str(path.relative_to(context.out)) for path in watcher.folder.glob("*.mp4"))


class AttentionFilm(Watcher):
    """Films episodes with maps of attention over the first camera's image, one panel a head."""

    draws_every_step = True

    def __init__(self, context: Context, suite: str, chosen: Sequence[Chosen]) -> None:
        where = get_suite(suite)
        settings = settle(context.options, context.model_name, context.model, where)
        self.model, self.chosen, self.fps = context.model, tuple(chosen), where.fps
        self.folder = context.folder("films")
        self.camera, self.source = next(iter(settings.cameras.items()))
        self.cameras = settings.cameras
        self._views: dict[str, CameraView] = {}
        self._films: dict[int, Film] = {}
        self._rows: list[Cell] = []
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """One function at all heads' sites."""
        self._rows = list(rows)
        return [(list(dict.fromkeys(each.site for each in self.chosen)), self._keep)]

    def _keep(self, pattern: Tensor, hook: HookPoint) -> None:
        """The chosen heads' attention to the camera, mean over all query tokens that are not padding."""
        for each in (one for one in self.chosen if one.site == hook.name):
            at = hook.key_segments.positions(f"image:{self.camera}") if hook.key_segments is not None else []
            for row, keys in enumerate(at):
                # rows that no episode has repeat the first one
                cell = self._rows[row]
                if any(other.id == cell.id for other in self._rows[:row]):
                    continue
                seen = pattern[row, each.head][_asking(hook, row)][:, keys].mean(0)
                self._maps[cell.id, each.label] = seen.detach().float().cpu().numpy()

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """The next frame of the episode's film."""
        image = before["pixels"][self.source]
        panels = [image.repeat(_FILM_SCALE, axis=0).repeat(_FILM_SCALE, axis=1)]
        panels += [self._panel(cell, each.label, image, before) for each in self.chosen]
        if cell.id not in self._films:
            self._films[cell.id] = Film(self.folder / f"episode_{cell.id:03d}_{cell.task}.mp4", self.fps)
        self._films[cell.id].add(np.concatenate(panels, axis=1))

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        """The film appears before the episode counts as run."""
        self._films.pop(part.cell.id).close()

    def _panel(
        self, cell: Cell, label: str, image: UInt8[np.ndarray, "height width 3"], before: Mapping[str, Any]
    ) -> UInt8[np.ndarray, "high wide 3"]:
        if not self._views:
            images = {camera: before["pixels"][source] for camera, source in self.cameras.items()}
            found = camera_views(self.model, Observation(images, before["state"], before["instruction"]))
            self._views = {view.source: view for view in found.values()}
        view = self._views[self.camera]
        grid = view.on_grid(torch.from_numpy(self._maps[cell.id, label])).numpy()
        norm = Normalize(2 - _FILM_REACH, _FILM_REACH)
        return to_bytes(overlay(image, grid / grid.mean(), view, norm), _FILM_SCALE)


def _asking(hook: HookPoint, row: int) -> Tensor:
    """The query tokens that are not padding, and show no image."""
    segments = hook.segments
    assert segments is not None
    named = [name for name in segments.present() if name != "pad" and not name.startswith("image:")]
    asking = torch.stack([segments.mask(name)[row] for name in named or segments.present()]).any(0)
    return asking.nonzero().flatten()
