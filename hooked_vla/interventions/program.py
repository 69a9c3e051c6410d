"""All edits at one hook point, as the function that is attached there."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions import sae_operators  # noqa: F401  (adds its operators)
from hooked_vla.interventions.edits import (
    Ablate,
    Clamp,
    Edit,
    Overwrite,
    Patch,
    ProjectOut,
    Scale,
    SubspacePatch,
)
from hooked_vla.interventions.operators import OPERATORS, Operator
from hooked_vla.interventions.places import Scenes, Site, check_site
from hooked_vla.interventions.sae_edits import SAEFeatureEdit, SAEReconstruct


def joint_kind(edit: Edit) -> Hashable:
    """Edits next to each other with equal kinds, on different rows, run as one operator."""
    where = edit.where
    steps = (OPERATORS[type(edit)], where.denoise)
    if isinstance(edit, Patch | Ablate | Overwrite):
        blends = isinstance(edit, Patch) and edit.strength is not None
        return (*steps, where.heads, where.channels, where.keys, blends)
    if isinstance(edit, Scale | Clamp):
        return (*steps, where.heads, where.channels, where.keys)
    if isinstance(edit, ProjectOut):
        return (*steps, "out", edit.basis, edit.center is None)
    if isinstance(edit, SubspacePatch):
        return (*steps, "patch", edit.basis)
    if isinstance(edit, SAEReconstruct | SAEFeatureEdit):
        kept = isinstance(edit, SAEFeatureEdit) and edit.keep_error
        return (*steps, type(edit), edit.sae, kept, edit.pool, where.tokens if edit.pool == "segment" else None)
    return (*steps, type(edit))


def grouped(edits: Sequence[Edit]) -> list[list[int]]:
    """Indices of edits that run together, in order."""
    groups: list[list[int]] = []
    for i, edit in enumerate(edits):
        group = groups[-1] if groups else []
        used = [edits[j].where.rows for j in group]
        rows = edit.where.rows
        apart = rows is not None and all(each is not None and not set(each) & set(rows) for each in used)
        if group and apart and joint_kind(edits[group[0]]) == joint_kind(edit):
            group.append(i)
        else:
            groups.append([i])
    return groups


class Program:
    """Runs edits on the values of one hook point, in their order.

    edits: all that touch the point; labels: what messages call each.
    Raises ValueError naming the edit that does not fit the point.
    """

    def __init__(self, edits: Sequence[Edit], labels: Sequence[str], site: Site) -> None:
        for edit, label in zip(edits, labels, strict=True):
            check_site(edit, label, site)
        self.labels, self.edits, self.groups = list(labels), list(edits), grouped(edits)
        # rows of the value for each row of the batch: several where they are camera images
        self._rows_each = 1
        self._build(site)

    def _build(self, site: Site) -> None:
        self.site = site
        self.operators: list[Operator] = [
            OPERATORS[type(self.edits[group[0]])]([self.edits[i] for i in group], [self.labels[i] for i in group], site)
            for group in self.groups
        ]
        self.needs_placing = any(operator.needs_placing for operator in self.operators)
        self._placed_for: object = None
        self._env_step: int | None = None

    @property
    def steps(self) -> list[int] | None:
        """The denoise steps at which anything happens; None for all."""
        chosen: set[int] = set()
        for operator in self.operators:
            if operator.steps is None:
                return None
            chosen |= set(operator.steps)
        return sorted(chosen)

    def load(self, edits: Sequence[Edit]) -> None:
        """Take other parameters; `edits` has the same kinds of edits in the same order.

        Raises ValueError where they could not run as the ones before did; some of them may have changed then.
        """
        joint = [[edits[i] for i in group] for group in self.groups]
        if any(len(grouped(each)) > 1 for each in joint):
            raise ValueError(
                f"{', '.join(self.labels)}: these run together, and with this change no longer can: make a new EditSet"
            )
        for each, operator in zip(joint, self.operators, strict=True):
            operator.load(each)
        self.edits, self._placed_for = list(edits), None

    def place(self, scenes: Scenes, env_step: int | None, sizes: Sequence[int | str] | None = None) -> None:
        """Find the tokens to change; nothing runs yet. sizes: of the value, where they are known.

        Raises ValueError for unknown segments, rows and positions out of range, sources that do not fit the edited
        tokens, edits that reach no value, and edits by environment step where nobody says which it is.
        """
        if not self.needs_placing:
            return
        timed = [label for label, edit in zip(self.labels, self.edits, strict=True) if edit.where.env is not None]
        if env_step is None and timed:
            raise ValueError(
                f"{', '.join(timed)}: env: the environment step is not known; whoever drives the rollout sets "
                "model.run_state.env_step"
            )
        scene = scenes.scene(self.site.point, self.site.layout, self.site.sizes if sizes is None else sizes)
        for operator in self.operators:
            if operator.needs_placing:
                operator.place(scene, env_step)
        self._rows_each = max(1, scene.rows // scene.batch)
        self._placed_for, self._env_step = scenes.table, env_step

    def _follow(self, value: Tensor, hook: HookPoint) -> None:
        """Notice that the model has moved, that another forward pass runs, and that the clock went on."""
        if value.dtype != self.site.dtype or value.device != self.site.device:
            self._build(replace(self.site, dtype=value.dtype, device=value.device))
        run = hook.run
        if self.needs_placing and (self._placed_for is not run.segments or self._env_step != run.env_step):
            rows = value.shape[0] if self.site.layout.has_rows else 1
            self.place(Scenes(run.segments, rows // self._rows_each), run.env_step, value.shape)

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor:
        # compiled code runs on tensors that were placed beforehand
        if not torch.compiler.is_compiling():
            self._follow(value, hook)
        step = hook.denoise_step
        x = y = self.site.layout.flatten(value)
        for operator in self.operators:
            if operator.steps is None or step in operator.steps:
                y = self._run(operator, y, step)
        return value if y is x else self.site.layout.restore(y, value)

    def _run(self, operator: Operator, x: Tensor, step: int | None) -> Tensor:
        """The edit of x; what a kernel refuses is told as the edit's."""
        if torch.compiler.is_compiling():
            return operator(x, step)
        try:
            return operator(x, step)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{', '.join(operator.labels)} at {self.site.name}: {error}") from error

    def __repr__(self) -> str:
        return ", ".join(self.labels)
