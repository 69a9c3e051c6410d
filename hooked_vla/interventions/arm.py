"""Edits as an arm of a sweep of rollouts: what `hooked_vla.rollouts.arms` asks of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel, HookRequest
from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions.edit_set import EditSet
from hooked_vla.interventions.edits import Edit
from hooked_vla.interventions.files import describe_edits
from hooked_vla.interventions.places import Layout, Site
from hooked_vla.interventions.program import Program


@dataclass(frozen=True)
class EditArm:
    """Rollouts under the edits, in all rows that the arm has. name: unique in the sweep.

    What does not fit the model at all, a sweep finds out with `check` before any episode; what does not fit a value or
    its tokens shows at the first forward pass under the arm.
    Raises ValueError for no edits, and for edits that name rows: which rows an arm has, the sweep decides.
    """

    name: str
    edits: Sequence[Edit]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        if not self.edits:
            raise ValueError(f"arm {self.name!r} has no edits; an arm without edits is BASELINE")
        if rows := [str(edit) for edit in self.edits if edit.rows is not None]:
            raise ValueError(f"arm {self.name!r}: the sweep decides which rows an arm has, but edits name some: {rows}")

    def describe(self) -> Mapping[str, Any]:
        """The edits as JSON-serialisable data; large tensors by their digests."""
        return {"kind": "edits", **describe_edits(self.edits)}

    def check(self, model: HookedModel) -> None:
        """Raises ValueError, naming the arm, where `EditSet` would refuse the edits; warns as it does."""
        try:
            EditSet(model, self.edits)
        except (KeyError, ValueError) as error:
            raise ValueError(f"arm {self.name!r}: {error.args[0]}") from error

    def hooks(self, rows: Sequence[Any]) -> Sequence[HookRequest]:
        """Hook patterns and functions, in the edits' order."""
        return [(list(edit.where.sites), _Lazy(edit)) for edit in self.edits]


class _Lazy:
    """An edit that gets its tensors when it sees the first value of each hook point."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.label = f"edit {edit.name!r} ({edit.kind})" if edit.name else f"edit {edit.kind}"
        self._programs: dict[str, Program] = {}

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        denoise = self.edit.where.denoise
        if denoise is not None and not hook_names.is_denoised(hook.name):
            raise ValueError(f"{self.label}: denoise: {hook.name} runs once per chunk, not at denoise steps")
        if denoise is not None and hook.denoise_step not in denoise:
            return None
        return self.program(value, hook)(value, hook)

    def program(self, value: Tensor, hook: HookPoint) -> Program:
        if hook.name not in self._programs:
            rows = hook.axes[0] if Layout.of(hook).has_rows else None
            sizes = (*([rows] if rows else []), *value.shape[bool(rows) :])
            site = Site(hook, Layout.of(hook), sizes, None, value.dtype, value.device)
            self._programs[hook.name] = Program([self.edit], [self.label], site)
        return self._programs[hook.name]

    def __repr__(self) -> str:
        return self.label
