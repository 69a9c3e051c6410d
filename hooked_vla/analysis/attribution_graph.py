"""One run with its graph kept, and what gradients in it say of patches.

Every value of interest becomes a node of its own, for each denoise step: a gradient there is that of this value, also
where one tensor passes several hook points or serves every step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla.analysis.patching import measure
from hooked_vla.analysis.patching_cells import Cell, Metric, Runs, quiet
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions import Patch
from hooked_vla.interventions.places import Layout

# (point, number of the value there: the denoise step, or 0)
Key = tuple[str, int]


@dataclass
class Nodes:
    """Values of a run that gradients are asked for. values: point -> one for each denoise step."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def keep(self, value: Tensor, hook: HookPoint) -> Tensor:
        """A hook: the value goes on as a node of its own."""
        node = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        self.values.setdefault(hook.name, []).append(node)
        # a leaf could not be changed in place by what comes
        return node.view_as(node)

    def keys(self, names: Iterable[str]) -> list[Key]:
        return [(name, i) for name in names for i in range(len(self.values.get(name, ())))]

    def gradients(self, metric: Tensor, keys: Sequence[Key]) -> dict[Key, Tensor]:
        """Of a scalar; 0 where it does not depend on the node. The graph stays."""
        nodes = [self.values[name][i] for name, i in keys]
        found = torch.autograd.grad(metric, nodes, retain_graph=True, allow_unused=True)
        pairs = zip(keys, nodes, found, strict=True)
        return {key: torch.zeros_like(node) if grad is None else grad for key, node, grad in pairs}


@dataclass
class GraphRun:
    """A forward pass with its graph. nodes: at the sites; came_to: what metrics compare, with its graph."""

    nodes: Nodes
    came_to: Tensor

    @classmethod
    def of(
        cls,
        runs: Runs,
        tape: Tape,
        edits: Sequence[Sequence[Patch]],
        sites: Sequence[str],
        after: Sequence[tuple[Sequence[str], Callable[[Tensor, HookPoint], Tensor | None]]] = (),
    ) -> "GraphRun":
        """Rows of the base run under their edits, which the nodes stand behind. after: hooks behind the nodes."""
        inputs, noise = tape.copies(len(edits) // runs.rows)
        nodes, read = Nodes(), Nodes()
        hooks = [(list(sites), nodes.keep), *[(list(names), fn) for names, fn in after]]
        if runs.read is not None:
            hooks.append(([runs.read], read.keep))
        listed = [list(each) for each in edits]
        with (
            torch.enable_grad(), quiet(), tape.resumed(len(edits) // runs.rows),
            runs.model.edits(listed) if any(listed) else nullcontext(), runs.model.hooks(hooks),
        ):  # fmt: skip
            actions = runs.model(inputs, noise)
        if runs.read is None:
            return cls(nodes, actions.normalized)
        values = read.values[runs.read]
        return cls(nodes, torch.stack(values, dim=1) if hook_names.is_denoised(runs.read) else values[0])

    def measured(self, runs: Runs, metric: Metric, base: Tensor) -> Float[Tensor, " row"]:
        """The metric of every row, with its graph. base: what the unpatched rows came to."""
        n = len(self.came_to) // len(base)
        shape = [n, *[1] * (base.ndim - 1)]
        values = measure(metric, self.came_to, base.detach().repeat(shape), runs.donor_came_to.repeat(shape))
        if not values.requires_grad:
            raise ValueError("the metric has no gradient with respect to what it compares")
        return values


@dataclass(frozen=True)
class Place:
    """Where a cell lies in the value of its site. mask: of the rows of one pair. rows: of the value, for that pair."""

    layout: Layout
    mask: Bool[Tensor, "row place"]
    rows: slice

    @classmethod
    def of(cls, runs: Runs, cell: Cell, pair: int, value: Tensor, n_rows: int, row: int | None = None) -> "Place":
        """n_rows: batch rows of the value; row: the one that is the pair's, where they are not the pairs themselves."""
        layout = Layout.of(runs.model.points[cell.site])
        flat = layout.flatten(value)
        each = len(flat) // n_rows
        mask = runs.mask(cell, pair)
        mask = torch.ones(flat.shape[:2], dtype=torch.bool)[:each] if mask is None else mask
        start = (pair if row is None else row) * each
        return cls(layout, mask.to(value.device), slice(start, start + each))

    def pick(self, value: Tensor) -> Float[Tensor, "token channel"]:
        """The cell's tokens of a value at the site."""
        return self.layout.flatten(value)[self.rows][self.mask]


def donor_tokens(runs: Runs, cell: Cell, pair: int, place: Place, step: int) -> Float[Tensor, "token channel"]:
    """What the donor has for the tokens of a cell."""
    source = runs.source(cell, pair).tensor
    if hook_names.is_denoised(cell.site):
        source = source[step]
    flat = place.layout.flatten(source.to(place.mask.device))
    whole = flat.shape[:2] == place.mask.shape
    return flat[place.mask] if whole else flat.flatten(0, 1)


def steps_of(cell: Cell, nodes: Nodes) -> list[int]:
    """Which of the site's values the cell patches."""
    return list(range(len(nodes.values[cell.site]))) if cell.denoise_step is None else [cell.denoise_step]


def linear_effect(
    runs: Runs, cell: Cell, pair: int, nodes: Nodes, gradients: Mapping[Key, Tensor]
) -> Float[Tensor, ""]:
    """Gradient times (donor - base), over the cell's tokens and steps."""
    total = torch.zeros((), dtype=torch.float64)
    for step in steps_of(cell, nodes):
        value, gradient = nodes.values[cell.site][step].detach(), gradients[cell.site, step]
        place = Place.of(runs, cell, pair, value, runs.rows)
        change = donor_tokens(runs, cell, pair, place, step) - place.pick(value)
        total += (change.double() * place.pick(gradient).double()).sum().cpu()
    return total
