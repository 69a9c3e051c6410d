"""Path patching: what a patch does by one way through the model, and by no other (arXiv 2304.05969).

An edge goes from a sender to a receiver, directly: through residual streams, norms and projections, but not through
what attention and MLPs in between add to the stream. Two rows run in step. In the helper row the sender holds the
donor's value, and everything that is written afterwards is that of the other row; so a receiver's value there is what
it would be if the sender alone had changed. The other row takes over the receivers' values, and goes on from them.

Both rows live in one forward pass, so receivers that lie behind other receivers see what those did: patching the edges
to all readers of a stream is patching the sender itself, bit for bit.

>>> readers = {name: [name] for name in reading_points(model)}
>>> path_patching(model, clean, corrupted, ["vlm.blocks.0.hook_mlp_out"], readers, noise=noise).table
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.patching import PatchingResult, balanced, measure, tabulated
from hooked_vla.analysis.patching_cells import Cell, Direction, Metric, Runs, plan_cells, quiet
from hooked_vla.analysis.patching_resume import Noise, Tape
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions import Patch

# what is added to a residual stream, and what one round of a loop hands to the next
WRITES = (
    "hook_attn_out", "hook_mlp_out", "hook_cross_attn_out", "hook_conv1_out", "hook_conv2_out", "hook_conv2",
    "hook_deepstack", "hook_noisy_actions",
)  # fmt: skip
# where attention and MLPs read it, and what is read at the very end
READS = (
    "hook_q", "hook_k", "hook_v", "hook_pre", "hook_pre_linear", "hook_velocity", "hook_noise", "hook_clean_actions",
    "hook_logits", "hook_actions",
)  # fmt: skip


# a sender's cell, and the name of a group of receivers
Path = tuple[Cell, str]


def writing_points(model: HookedModel) -> list[str]:
    """Points that hold what attention, MLPs and convolutions add to a stream, and what a loop's round begins with."""
    # what was generated is the next token's input
    return [name for name in model.points if hook_names.leaf(name) in WRITES or name == "decode.hook_tokens"]


def reading_points(model: HookedModel) -> list[str]:
    """Points through which everything goes that a residual stream says: inputs of attention, MLPs and the head.

    Dead ends are left out.
    """
    about = model.hook_points
    return [
        name for name in model.points
        if hook_names.leaf(name) in READS and about[name].reaches_action and about[name].dtype.is_floating_point
    ]  # fmt: skip


def path_patching(
    model: HookedModel,
    clean: object,
    corrupted: object,
    senders: NamesFilter,
    receivers: Mapping[str, NamesFilter],
    segments: Sequence[str | None] | None = None,
    metric: Metric = recovery,
    direction: Direction = "denoising",
    *,
    noise: Noise,
    read: str | None = None,
    batch_rows: int = 32,
) -> PatchingResult:
    """The effect of every sender × segment on every group of receivers, directly.

    receivers: name -> hook points whose values are taken over together; a path through several is one group. Values
    are taken over at all denoise steps, and whole, whatever segment of the sender was patched. The rest as for
    `activation_patching`, whose result this is, with a column `receiver`.
    Raises as `activation_patching`; ValueError for a receiver that rows share, KeyError for an unknown one.
    """
    runs = Runs.of(model, clean, corrupted, direction, noise, read)
    cells = plan_cells(model, runs.segments, senders, segments, None)
    groups = {name: _resolved(model, name, sites) for name, sites in receivers.items()}
    names = list(dict.fromkeys(cell.site for cell in cells))
    runs.run_donor(names)
    tape = Tape.record(model, runs.base, runs.noise, names, n_steps=1)
    paths: list[Path | None] = [None]
    paths += sorted(itertools.product(cells, groups), key=lambda path: tape.first(path[0].site))
    came_to: dict[Path | None, Tensor] = {}
    for batch in balanced(paths, max(1, batch_rows // (2 * runs.rows))):
        edges = [None if path is None else (path[0], groups[path[1]]) for path in batch]
        came_to |= zip(batch, _run(runs, tape, edges).split(runs.rows), strict=True)
    return _result(runs, cells, list(groups), came_to, metric)


def _resolved(model: HookedModel, name: str, sites: NamesFilter) -> set[str]:
    found = hook_names.resolve(sites, list(model.points))
    if shared := [each for each in found if model.points[each].axes[0] not in ("batch", "image", "window")]:
        raise ValueError(f"receiver {name!r}: all rows of a batch share {shared[:3]}")
    return set(found)


def _run(runs: Runs, tape: Tape, edges: Sequence[tuple[Cell, set[str]] | None]) -> Tensor:
    """What the edges' rows came to; in the batch their helpers stand behind them, in the same order. None: no edge."""
    n = len(edges) * runs.rows
    first = min((tape.first(edge[0].site) for edge in edges if edge), default=0)
    taking: dict[str, list[int]] = {}
    for i, edge in enumerate(edges):
        for name in edge[1] if edge else ():
            taking.setdefault(name, []).extend(range(i * runs.rows, (i + 1) * runs.rows))
    hooks = [(name, _take_over(rows, n)) for name, rows in taking.items()]
    # what was written before any sender is the same in both rows
    hooks += [(name, _set_back(n)) for name in writing_points(runs.model) if not _precedes(tape, name, first)]
    edits: list[list[Patch]] = [[] for _ in range(n)]
    edits += [patch for edge in edges for patch in (runs.patches(edge[0]) if edge else [[]] * runs.rows)]
    inputs, noise = tape.copies(2 * len(edges))
    # in the order in which they are attached: receivers take over, helpers are set back, senders are patched
    with (
        torch.no_grad(), quiet(), tape.resumed(2 * len(edges)), runs.model.hooks(hooks),
        runs.model.edits(edits) if any(edits) else nullcontext(),
    ):  # fmt: skip
        actions, cache = runs.model.run_with_cache(inputs, runs.reads, noise=noise)
    assert actions is not None
    return runs.came_to(actions.normalized, cache)[:n]


def _precedes(tape: Tape, name: str, time: int) -> bool:
    """Whether a point's values are all there before that time."""
    return not hook_names.is_denoised(name) and name in tape.passed and tape.passed[name][-1][0] < time


def _take_over(rows: Sequence[int], n: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook: of n rows and their helpers, these rows get their helpers' values."""

    def take_over(value: Tensor, hook: HookPoint) -> Tensor:
        # camera images and windows have several rows for each row of the batch
        each, value = len(value) // (2 * n), value.clone()
        for row in rows:
            value[row * each : (row + 1) * each] = value[(n + row) * each : (n + row + 1) * each]
        return value

    return take_over


def _set_back(n: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook: helpers get the values of the rows that they help."""

    def set_back(value: Tensor, hook: HookPoint) -> Tensor:
        half = value[: len(value) // 2]
        return torch.cat([half, half])

    return set_back


def _result(
    runs: Runs,
    cells: Sequence[Cell],
    groups: Sequence[str],
    came_to: Mapping[Path | None, Tensor],
    metric: Metric,
) -> PatchingResult:
    base, paths = came_to[None], [(cell, group) for cell in cells for group in groups]
    edited = torch.cat([base, runs.donor_came_to, *(came_to[path] for path in paths)])
    shape = [len(paths) + 2, *[1] * (base.ndim - 1)]
    values = measure(metric, edited, base.repeat(shape), runs.donor_came_to.repeat(shape))
    unpatched, given, *patched = values.split(runs.rows)
    rows = []
    for (cell, group), value in zip(paths, patched, strict=True):
        effect = value - unpatched
        share = effect / (given - unpatched)
        about = cell.describe() | {"receiver": group}
        caveats = {"reaches_action": runs.caveats(cell)["reaches_action"], "replay": ""}
        rows += [
            about
            | {"pair": i, "value": float(value[i]), "effect": float(effect[i]), "share": float(share[i])}
            | caveats
            for i in range(runs.rows)
            if runs.has(cell, i)
        ]
    return PatchingResult(tabulated(rows), unpatched, given)
