"""Arms: what distinguishes the runs that are compared. Each is named, says what it does in JSON, and gives hooks;
some also change what the policy sees.

Rows of a batch may belong to different arms: the hooks of an arm then change its own rows only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vla.hooks.cache import ROW_AXES
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.rollouts.cells import Cell


@runtime_checkable
class Arm(Protocol):
    """What an arm offers; any object with these will do.

    name: unique in a sweep. describe(): the edit as JSON-serialisable data, which the manifest keeps: two arms that
    do different things must describe themselves differently. hooks(rows): pairs of hook pattern and function, as
    `HookedVLA.hooks` takes them; rows are the cells in the rows of the batch (row i acts in `rows[i].task` from
    `rows[i].seed`; a row past the group's last cell repeats the first one). While the functions run,
    `hook.run.env_step` is the environment step and `hook.denoise_step` the denoise step. What other arms' rows see of
    the functions is undone, so they need not know about arms.
    """

    @property
    def name(self) -> str: ...

    def describe(self) -> Mapping[str, Any]: ...

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]: ...


@runtime_checkable
class ObservingArm(Arm, Protocol):
    """An arm that also changes what the policy sees.

    observe(cell, env_step, frame): the observation {"pixels": {camera: uint8 [H W 3]}, "state", "instruction"} that
    the policy gets in place of `frame`, which must stay as it is: the tables and the environment keep what was there.
    """

    def observe(self, cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]: ...


@runtime_checkable
class CheckedArm(ObservingArm, Protocol):
    """An arm that looks whether what it changes reaches the model, at the first plan of each of its episodes.

    check(model, settings, cell, before, after): a hooked model, the rollouts' settings, and the episode's first
    observation as the environment shows it and as `observe` does. Raises ValueError to end the rollouts.
    """

    def check(
        self, model: Any, settings: Any, cell: Cell, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> None: ...


@dataclass(frozen=True)
class Baseline:
    """No edit."""

    name: str = "baseline"

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "baseline"}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return ()


BASELINE = Baseline()


@dataclass(frozen=True)
class FunctionArm:
    """Python functions as edits. description: what they do, in words, since functions do not serialise.

    Raises ValueError for an empty description or no requests.
    """

    name: str
    requests: tuple[HookRequest, ...]
    description: str

    def __post_init__(self) -> None:
        if not self.description.strip():
            raise ValueError(f"arm {self.name!r}: functions need a description of what they do")
        if not self.requests:
            raise ValueError(f"arm {self.name!r} has no hooks; an arm without edits is BASELINE")

    def describe(self) -> Mapping[str, Any]:
        sites = [_site_text(site) for site, _ in self.requests]
        return {"kind": "functions", "sites": sites, "description": self.description}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return self.requests


def _site_text(site: Any) -> Any:
    """A filter of hook points as JSON."""
    if site is None or isinstance(site, str):
        return site
    if isinstance(site, Sequence):
        return [_site_text(each) for each in site]
    return getattr(site, "pattern", None) or getattr(site, "__qualname__", None) or type(site).__name__


def describe_arms(arms: Sequence[Arm]) -> dict[str, Any]:
    """The arms' descriptions by name, as they read back from JSON.

    Raises ValueError for no arms, an empty name or one used twice, and a description that JSON cannot hold.
    """
    names = [arm.name for arm in arms]
    if not names:
        raise ValueError("no arms: pass at least BASELINE")
    if bad := sorted({name for name in names if not name or names.count(name) > 1}):
        raise ValueError(f"arms need different names that are not empty; used more than once or empty: {bad}")
    found = {}
    for arm in arms:
        try:
            found[arm.name] = json.loads(json.dumps(arm.describe(), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {arm.name!r}: its description is not JSON: {error}") from error
    return found


def group_hooks(arms: Sequence[Arm], rows: Sequence[Cell], n_cells: int) -> list[HookRequest]:
    """The hooks of a batch whose first `n_cells` rows are a group's cells, and the others padding."""
    present = list(dict.fromkeys(cell.arm for cell in rows[:n_cells]))
    by_name = {arm.name: arm for arm in arms}
    if len(present) == 1:
        return list(by_name[present[0]].hooks(rows))
    requests: list[HookRequest] = []
    for name in present:
        own = torch.tensor([row < n_cells and cell.arm == name for row, cell in enumerate(rows)])
        requests += [(site, only_rows(fn, own)) for site, fn in by_name[name].hooks(rows)]
    return requests


def only_rows(fn: HookFunction, rows: Bool[Tensor, " batch"]) -> HookFunction:
    """The hook function, limited to some batch rows: all others keep their values, bit for bit.

    At points whose rows are single images or windows of a batch row, those of the chosen rows change.
    The returned function raises ValueError at a point whose value all rows share.
    """

    def edit(value: Tensor, hook: HookPoint) -> Tensor:
        if hook.axes[0] not in ROW_AXES:
            raise ValueError(
                f"{hook.name} ({' '.join(hook.axes)}) is shared by all rows: an arm that edits it needs a batch to "
                "itself; run the arms one by one"
            )
        copy = value.clone()
        result = fn(copy, hook)
        # None means that the function changed its copy in place, or nothing
        result = copy if result is None else result
        if not isinstance(result, Tensor) or result.shape != value.shape or result.dtype != value.dtype:
            return result
        chosen = rows.repeat_interleave(value.shape[0] // len(rows)).to(value.device)
        return torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), result, value)

    edit.__name__ = getattr(fn, "__name__", type(fn).__name__)
    return edit
