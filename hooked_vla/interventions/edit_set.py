"""Edits compiled onto a model: sites found, everything checked, parameters in tensors that can be set between calls."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import Hook, HookedModel
from hooked_vla.hooks.sites import HookSite
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions.edits import Edit, per_row
from hooked_vla.interventions.places import Layout, Scenes, Site
from hooked_vla.interventions.program import Program
from hooked_vla.interventions.reach import warn_of_reach

Edits = Sequence[Edit] | Sequence[Sequence[Edit]]


class EditSet:
    """Edits of one model, ready to be attached, as often as wanted.

    Iterating gives the edits as they are now. points: edit name -> the hook points that it edits.
    """

    def __init__(self, model: HookedModel, edits: Edits) -> None:
        """edits: in the order in which they act at a point; or a list of them for each row of the batch.

        Raises KeyError for a site that matches no hook point, with the nearest names; ValueError, naming the edit and
        the argument, for equal names, widths that do not fit, denoise steps that the model does not have, and whatever
        else can be told before a run; TypeError for what is no edit. Warns where an edit reaches no action, and where
        edits replace all that the actions depend on.
        """
        self.model = model
        self._edits = _named(edits)
        sites = model.hook_points
        self.points = {edit.name: self._resolve(edit, sites) for edit in self._edits}
        touched = [name for name in model.points if any(name in points for points in self.points.values())]
        self._programs = {name: self._program(name, sites[name]) for name in touched}
        self._attached: list[Hook] = []
        warn_of_reach(model, self)

    def _resolve(self, edit: Edit, sites: dict[str, HookSite]) -> list[str]:
        label, where = _label(edit), edit.where
        try:
            found = hook_names.resolve(list(where.sites), list(sites))
        except KeyError as error:
            raise KeyError(f"{label}: site: {error.args[0]}") from error
        if where.denoise is not None:
            if once := [name for name in found if not sites[name].denoised]:
                raise ValueError(f"{label}: denoise: {', '.join(once[:3])} runs once per chunk, not at denoise steps")
            if outside := [step for step in where.denoise if step >= self.model.n_denoise_steps]:
                raise ValueError(
                    f"{label}: denoise steps {outside}: this model's are 0..{self.model.n_denoise_steps - 1}"
                )
        return found

    def _at(self, point: str, edits: Sequence[Edit]) -> list[Edit]:
        return [edit for edit in edits if point in self.points[edit.name]]

    def _program(self, name: str, about: HookSite) -> Program:
        edits, point = self._at(name, self._edits), self.model.points[name]
        layout = Layout.of(point)
        device = _device(self.model, about.pathway)
        site = Site(point, layout, about.shape, self.model.n_denoise_steps, about.dtype, device)
        return Program(edits, [_label(edit) for edit in edits], site)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __getitem__(self, name: str) -> Edit:
        """The edit of that name, as it is now. Raises KeyError with the nearest name."""
        for edit in self._edits:
            if edit.name == name:
                return edit
        near = difflib.get_close_matches(name, list(self.points), n=1, cutoff=0.0)
        raise KeyError(f"no edit is named {name!r}; nearest: {', '.join(near) or 'there are none'}")

    def __str__(self) -> str:
        lines = [f"{len(self)} edits at {len(self._programs)} hook points"]
        for edit in self._edits:
            points = self.points[edit.name]
            lines.append(f"  {edit}" + ("" if list(edit.where.sites) == points else f"  ({len(points)} hook points)"))
        return "\n".join(lines)

    def set(self, name: str, **changes: Any) -> None:
        """Change an edit from the next forward pass on; compiled code and captured graphs run on as they are.

        changes: fields of the edit and their new values, of the same shapes: strength, source, tokens, rows, env, ...
        Raises KeyError for an unknown name; ValueError for unknown fields, and for changes that need another EditSet:
        of the site, the denoise steps, a tensor's shape, or of edits by token, row or time into edits of everything.
        Then nothing has changed.
        """
        old = self[name]
        known = [each.name for each in fields(old)]
        if unknown := [each for each in changes if each not in known]:
            raise ValueError(f"{_label(old)}: {old.kind} has no {', '.join(unknown)}; it has {', '.join(known)}")
        new = replace(old, **changes)
        if fixed := [each for each in old.fixed if getattr(old, each, None) != getattr(new, each, None)]:
            raise ValueError(f"{_label(old)}: {', '.join(fixed)} cannot change: make a new EditSet")
        if old.where.is_masked != new.where.is_masked:
            raise ValueError(
                f"{_label(old)}: an edit of everything cannot become one of some tokens, rows or environment steps, "
                "nor the other way round: make a new EditSet"
            )
        before, after = self._edits, [new if edit is old else edit for edit in self._edits]
        touched = [(point, program) for point, program in self._programs.items() if point in self.points[name]]
        try:
            for point, program in touched:
                program.load(self._at(point, after))
        except (TypeError, ValueError):
            for point, program in touched:
                program.load(self._at(point, before))
            raise
        self._edits = after

    def prepare(self, inputs: ModelInputs) -> None:
        """Find the tokens that the edits change in a forward pass that has begun; done by the model when one begins.

        Raises ValueError as `Program.place`.
        """
        if any(program.needs_placing for program in self._programs.values()):
            run = self.model.run_state
            scenes = Scenes(run.segments, inputs.batch_size)
            for program in self._programs.values():
                program.place(scenes, run.env_step)

    @contextmanager
    def attached(self) -> Iterator["EditSet"]:
        """The edits act in the block, and whatever ends it, they are gone.

        Raises RuntimeError where they are attached already, and at the end of the block when the model ran and an edit
        came upon no value.
        """
        if self.prepare in self.model.before_run:
            raise RuntimeError("these edits are attached already")
        runs = self.model.n_runs
        self.model.before_run.append(self.prepare)
        try:
            for name, program in self._programs.items():
                self._attached.append(self.model.add_hook(name, program, at_steps=program.steps))
            yield self
            if self.model.n_runs > runs:
                self._check_fired()
        finally:
            self.model.before_run.remove(self.prepare)
            for hook in self._attached:
                hook.remove()
            self._attached = []

    def _check_fired(self) -> None:
        fired = {hook.request for hook in self._attached if hook.fired}
        if silent := [edit.name for edit in self._edits if not fired & set(self.points[edit.name])]:
            raise RuntimeError(f"the model ran, but edits {silent} came upon no value: their hook points did not fire")


def _label(edit: Edit) -> str:
    return f"edit {edit.name!r} ({edit.kind})"


def _named(edits: Edits) -> list[Edit]:
    """The edits as one list, each with a name of its own."""
    listed = list(edits)
    if listed and all(not isinstance(each, Edit) and isinstance(each, Sequence) for each in listed):
        listed = per_row(listed)  # pyright: ignore[reportArgumentType]
    for each in listed:
        if not isinstance(each, Edit):
            raise TypeError(f"edits must be Edits, or one list of them for each row, got {type(each).__name__}")
    taken = [edit.name for edit in listed if isinstance(edit, Edit) and edit.name]
    if twice := sorted({name for name in taken if taken.count(name) > 1}):
        raise ValueError(f"edits need different names, or none; used more than once: {twice}")
    found: list[Edit] = []
    for edit in listed:
        assert isinstance(edit, Edit)
        number, name = 1, edit.name
        while not name:
            candidate = edit.kind if number == 1 else f"{edit.kind}-{number}"
            name, number = ("" if candidate in taken else candidate), number + 1
        taken.append(name)
        found.append(replace(edit, name=name))
    return found


def _device(model: HookedModel, pathway: str) -> torch.device:
    """Where a pathway's values are, as far as its weights tell."""
    parts = (getattr(model.net, pathway, model.net), model.net)
    places = (p.device for part in parts for p in part.parameters() if not p.is_meta)
    return next(places, torch.device("cpu"))
