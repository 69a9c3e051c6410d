"""AtP*'s treatment of queries and keys: the attention pattern computed anew, instead of a gradient through its softmax.

One forward pass has it for all layers and steps: each row takes the donor's queries (or keys) of one segment
everywhere in a pathway, its patterns are kept, and then set back to the base run's, so that nothing goes on from there
(arXiv 2403.00745, section 3.1.1, which computes one head and token after the other).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.analysis.attribution_graph import Key, Nodes, Place, donor_tokens, steps_of
from hooked_vla.analysis.patching_cells import Cell, Runs, quiet
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.point import HookPoint

QUERIES, KEYS = ("hook_q", "hook_rot_q"), ("hook_k", "hook_rot_k", "hook_prefix_k")
QUERIES_AND_KEYS = (*QUERIES, *KEYS)

# cells that one row can hold together: pathway, which of the points, segment
_Row = tuple[str, str, str | None]


def pattern_of(model: HookedModel, site: str) -> str | None:
    """The attention pattern that a site's queries or keys make; None for other sites."""
    name = f"{site.rpartition('.')[0]}.hook_pattern"
    return name if hook_names.leaf(site) in QUERIES_AND_KEYS and name in model.points else None


@dataclass(frozen=True)
class PatternChange:
    """Patterns with the donor's queries or keys. nodes: of the base run. rows: where a cell's is in the batch that made
    them, counted in batches of the pairs. patterns: point -> one for each step."""

    runs: Runs
    nodes: Nodes
    rows: Mapping[_Row, int]
    patterns: Mapping[str, list[Tensor]]

    @classmethod
    def of(cls, runs: Runs, tape: Tape, cells: Sequence[Cell], nodes: Nodes) -> "PatternChange":
        """Run the base's rows with the donor's queries or keys. nodes: of the base run, patterns among them."""
        model, rows = runs.model, dict[_Row, int]()
        edits: list[list] = []
        for cell in cells:
            key = _row(cell)
            if key not in rows:
                rows[key] = len(rows)
                edits += [[] for _ in range(runs.rows)]
            for pair, patch in enumerate(runs.patches(Cell(cell.site, cell.segment, None))):
                held = edits[rows[key] * runs.rows + pair]
                # cells of single steps share the patch of all
                held += [each for each in patch if all(each.site != other.site for other in held)]
        kept: dict[str, list[Tensor]] = {}

        def keep_and_restore(value: Tensor, hook: HookPoint) -> Tensor:
            seen = kept.setdefault(hook.name, [])
            base = nodes.values[hook.name][len(seen)].detach()
            seen.append(value)
            return base.repeat(len(rows), *[1] * (base.ndim - 1))

        patterns = list(dict.fromkeys(name for cell in cells if (name := pattern_of(model, cell.site))))
        inputs, noise = tape.copies(len(rows))
        with (
            torch.no_grad(), quiet(), tape.resumed(len(rows)),
            model.edits(edits), model.hooks([(patterns, keep_and_restore)]),
        ):  # fmt: skip
            model(inputs, noise)
        return cls(runs, nodes, rows, kept)

    def effect(self, cell: Cell, pair: int, gradients: Mapping[Key, Tensor]) -> Float[Tensor, ""]:
        """Change of the pattern × gradient there; and, for keys, what is read of them elsewhere, linearly."""
        pattern = pattern_of(self.runs.model, cell.site)
        assert pattern is not None
        total = torch.zeros((), dtype=torch.float64)
        for step in steps_of(cell, self.nodes):
            base = self.nodes.values[pattern][step].detach()
            # camera images and windows have several rows for each pair
            each = len(base) // self.runs.rows
            row, here = (self.rows[_row(cell)] * self.runs.rows + pair) * each, slice(pair * each, (pair + 1) * each)
            change = self.patterns[pattern][step][row : row + each] - base[here]
            total += (change.double() * gradients[pattern, step][here].double()).sum().cpu()
            if hook_names.leaf(cell.site) in KEYS:
                total += self._elsewhere(cell, pair, pattern, step, gradients)
        return total

    def _elsewhere(self, cell: Cell, pair: int, pattern: str, step: int, gradients: Mapping[Key, Tensor]) -> Tensor:
        """The keys' gradient, less what of it comes by their own pattern, × (donor - base)."""
        keys = self.nodes.values[cell.site][step]
        scores = pattern.replace("hook_pattern", "hook_attn_scores")
        by_pattern = torch.autograd.grad(
            self.nodes.values[scores][step], keys, gradients[scores, step], retain_graph=True, allow_unused=True
        )[0]
        gradient = gradients[cell.site, step]
        rest = gradient if by_pattern is None else gradient - by_pattern
        place = Place.of(self.runs, cell, pair, keys.detach(), self.runs.rows)
        change = donor_tokens(self.runs, cell, pair, place, step) - place.pick(keys.detach())
        return (change.double() * place.pick(rest).double()).sum().cpu()


def _row(cell: Cell) -> _Row:
    return hook_names.pathway(cell.site), hook_names.leaf(cell.site), cell.segment
