"""Activation patching: what happens to one run when a part of it is taken from another, place by place.

Denoising patches the clean run into the corrupted one, and finds what is sufficient to restore it; noising the other
way round, and finds what is necessary (arXiv 2404.15255). Cells run side by side in the rows of a batch, those that
begin early first, and every batch is gone on with from its first patch (patching_resume.py).

>>> result = activation_patching(model, clean, corrupted, RESIDUALS, noise=noise)
>>> result.table.nlargest(5, "effect")[["site", "segment", "effect"]]
>>> result.heatmap()                                     # in a notebook; result.figure().savefig("patching.png")
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.patching_cells import RESIDUALS, Cell, Direction, Metric, Runs, plan_cells
from hooked_vla.analysis.patching_figures import draw, heatmap
from hooked_vla.analysis.patching_resume import Noise, Tape
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.names import NamesFilter

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

Each = TypeVar("Each")

__all__ = ["RESIDUALS", "PatchingResult", "activation_patching"]


@dataclass(frozen=True)
class PatchingResult:
    """What a sweep came to.

    table: one row a cell and pair that has such tokens: site, pathway, layer, point (the site's last word), segment
    ("all" for all tokens at once), denoise_step (none: all), pair; value: the metric; effect: value minus that of the
    run that is patched; share: effect as part of the donor run's; reaches_action: False for a dead end; replay: why the
    patch leaves nothing but the donor, empty where it does not.
    base, donor: the metric of the unpatched runs.
    """

    table: pd.DataFrame
    base: Float[Tensor, " pair"]
    donor: Float[Tensor, " pair"]

    def heatmap(self, columns: str = "segment", value: str = "effect", title: str = "") -> "PlotlyFigure":
        """Sites × segments (or another column), averaged over pairs and whatever else differs; pointing at a cell tells
        its numbers (plotly).

        Raises ValueError for a column that the table does not have, ModuleNotFoundError without plotly.
        """
        return heatmap(self.table, columns, value, title)

    def figure(self, columns: str = "segment", value: str = "effect", title: str = "") -> Figure:
        """The same for paper (matplotlib), with the numbers in the cells. Raises ValueError as `heatmap`."""
        return draw(self.table, columns, value, title)


def activation_patching(
    model: HookedModel,
    clean: object,
    corrupted: object,
    sites: NamesFilter = RESIDUALS,
    segments: Sequence[str | None] | None = None,
    denoise_steps: Sequence[int] | None = None,
    metric: Metric = recovery,
    direction: Direction = "denoising",
    *,
    noise: Noise,
    read: str | None = None,
    batch_rows: int = 32,
    resume: bool = True,
    progress: bool = False,
) -> PatchingResult:
    """Patch every site × segment × denoise step by itself, and measure what comes out.

    clean, corrupted: observations, batches or inputs; several rows are as many pairs. noise: every draw of the model in
    order, for these rows; [] where it draws nothing. sites, segments, denoise_steps: as `plan_cells` takes them.
    metric(edited, base, donor): [row ...] each, of the normalised actions [row step d_action] or of the hook point
    `read` (of a repeated one [row step ...]) to one number a row; the default is 0 for the run that is patched and 1
    for the donor's. batch_rows: rows of a forward pass. resume: go on from the first patch, not from the start.
    Numbers differ from those of one forward pass a cell in the last bits, where the kernels of larger batches do; with
    batch_rows=1 they do not differ.
    Raises as `plan_cells`, `Runs.of` and `Runs.source`; ValueError for a metric that does not give one number a row.
    """
    runs = Runs.of(model, clean, corrupted, direction, noise, read)
    cells = plan_cells(model, runs.segments, sites, segments, denoise_steps)
    names = list(dict.fromkeys(cell.site for cell in cells))
    runs.run_donor(names)
    per_batch = max(1, batch_rows // runs.rows)
    order: list[Cell | None] = [None, *cells]
    tape = None
    if resume:
        n_steps = 1 if denoise_steps is None else max(denoise_steps, default=0) + 1
        tape = Tape.record(model, runs.base, runs.noise, [*names, *runs.reads], n_steps)
        begins = {cell: tape.first(cell.site, cell.steps) for cell in cells}
        order = [None, *sorted(cells, key=begins.__getitem__)]
    came_to: dict[Cell | None, Tensor] = {}
    with tqdm(total=len(order), unit="cell", disable=not progress) as bar:
        for batch in balanced(order, per_batch):
            lists = [patch for cell in batch for patch in (runs.patches(cell) if cell else [[]] * runs.rows)]
            came_to |= zip(batch, runs.run(lists, tape).split(runs.rows), strict=True)
            bar.update(len(batch))
    return _result(runs, cells, came_to, metric)


def balanced(order: Sequence[Each], most: int) -> Iterator[Sequence[Each]]:
    """Batches of at most `most`, all nearly equally large."""
    size = math.ceil(len(order) / math.ceil(len(order) / most))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _result(runs: Runs, cells: Sequence[Cell], came_to: dict[Cell | None, Tensor], metric: Metric) -> PatchingResult:
    base, donor = came_to[None], runs.donor_came_to
    edited = torch.cat([base, donor, *(came_to[cell] for cell in cells)])
    n = len(cells) + 2
    values = measure(metric, edited, base.repeat(n, *[1] * (base.ndim - 1)), donor.repeat(n, *[1] * (base.ndim - 1)))
    unpatched, given, *patched = values.split(runs.rows)
    rows = []
    for cell, value in zip(cells, patched, strict=True):
        effect = value - unpatched
        columns = zip(value.tolist(), effect.tolist(), (effect / (given - unpatched)).tolist(), strict=True)
        about, caveats = cell.describe(), runs.caveats(cell)
        rows += [
            about | {"pair": pair, "value": each, "effect": change, "share": share} | caveats
            for pair, (each, change, share) in enumerate(columns)
            if runs.has(cell, pair)
        ]
    return PatchingResult(tabulated(rows), unpatched, given)


def measure(metric: Metric, edited: Tensor, base: Tensor, donor: Tensor) -> Float[Tensor, " row"]:
    """The metric, checked. Raises ValueError unless it gives one number a row."""
    values = metric(edited, base, donor)
    if not isinstance(values, Tensor) or values.shape != (len(edited),):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the metric must give one number a row, [{len(edited)}], got {shape}")
    return values


def tabulated(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """Rows as a table whose layers and denoise steps are whole numbers, or missing."""
    table = pd.DataFrame(list(rows))
    return table.astype({"layer": "Int64", "denoise_step": "Int64"})
