"""What edits can show: dead ends, which no action depends on, and cut sets, behind which only the source is left.

Replacing everything that flows from the observation to the actions makes the actions those of the source: that is
replay, whatever the model does with it. `cut_set` tells the common cases from the hook points' names; `is_replay` finds
out by running, and covers every case. Which tokens are padding, and with it where a token stands, is told by masks that
no edit reaches: runs under a cut set still differ with the length of the instruction, and with it alone.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions.edits import Ablate, Edit, Overwrite, Patch

if TYPE_CHECKING:
    from hooked_vla.interventions.edit_set import EditSet

# what a pathway that runs repeatedly is told of the observation, besides what its attention reads of the prefix
_TOLD = (
    "hook_in", "hook_state", "hook_embed_state", "hook_embed_vlm", "hook_embed_aux", "hook_embed_image",
    "hook_embed_environment",
)  # fmt: skip
# of these, what the vlm made
_FROM_VLM = ("hook_in", "hook_embed_vlm")
# one of these is all that the rest of the model sees
_LAST = ("hook_velocity", "hook_noise", "hook_out", "ln_final.hook_normalized")


class DeadEndWarning(UserWarning):
    """An edit changes values that no action depends on."""


class CutSetWarning(UserWarning):
    """Edits replace everything that flows from the observation to the actions."""


def warn_of_reach(model: HookedModel, edits: "EditSet") -> None:
    """Warn of edits that are dead ends, and of edits that together are a cut set."""
    sites = model.hook_points
    for edit in edits:
        points = edits.points[edit.name]
        if not any(sites[name].reaches_action for name in points):
            _warn(f"edit {edit.name!r} is a dead end: no action depends on {', '.join(points[:3])}", DeadEndWarning)
    whole = [edit for edit in edits if _replaces_all(edit, model)]
    for row in (None, *sorted({row for edit in whole for row in edit.where.rows or ()})):
        chosen = [edit for edit in whole if edit.where.rows is None or row in edit.where.rows]
        reason = cut_set(model, {point for edit in chosen for point in edits.points[edit.name]}) if chosen else None
        if reason is not None:
            names, where = ", ".join(repr(edit.name) for edit in chosen), "" if row is None else f" in row {row}"
            _warn(
                f"edits {names} are a cut set{where}: they replace {reason}, and nothing that the model sees reaches "
                "its actions any more. What those come to is replay of the source, and no evidence of what the "
                "replaced values do",
                CutSetWarning,
            )
            if row is None:
                return


def _warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package that made the edits."""
    inside, level = (str(Path(__file__).parent.parent), contextlib.__file__), 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def is_replay(model: Any, edits: Any, first: Any, second: Any, noise: Any) -> bool:
    """Whether two different observations lead to the same actions, bit for bit, from the same noise under the edits.

    model: a HookedVLA; first, second: observations that differ in images, state and instruction, but not in how many
    tokens the instruction has.
    Raises ValueError where they lead to the same actions without the edits, which would prove nothing.
    """
    with torch.no_grad():
        plain = [model(obs, noise).normalized for obs in (first, second)]
        if torch.equal(*plain):
            raise ValueError("both observations lead to the same actions without any edit: they can show nothing")
        return torch.equal(*(model(obs, noise, edits=edits).normalized for obs in (first, second)))


def _replaces_all(edit: Edit, model: HookedModel) -> bool:
    """Whether nothing of a value is left in any place, at any denoise step."""
    where = edit.where
    parts = (where.tokens, where.positions, where.keys, where.heads, where.channels)
    if any(each is not None for each in parts) or not isinstance(edit, Patch | Ablate | Overwrite):
        return False
    if isinstance(edit, Patch) and edit.strength is not None:
        return False
    return where.denoise is None or len(where.denoise) == model.n_denoise_steps


def cut_set(model: HookedModel, replaced: Iterable[str]) -> str | None:
    """Why replacing all of these hook points' values cuts the actions off from the observation; None: not known to."""
    dead = {name for name, site in model.hook_points.items() if not site.reaches_action}
    flow = _Flow(model.points, dead, set(replaced))
    return flow.head_cut() or flow.expert_cut() or flow.entrance_cut()


@dataclass(frozen=True)
class _Flow:
    """What leads where, as far as names tell. replaced: points whose values are the same whatever the model sees."""

    points: Mapping[str, HookPoint]
    dead: set[str]
    replaced: set[str]

    def reads(self, way: str) -> dict[str, list[str]]:
        """Attention modules that read another stream -> the points at which they do."""
        found: dict[str, list[str]] = {}
        for name, point in self.points.items():
            if hook_names.pathway(name) == way and "prefix" in point.axes:
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def reads_cut(self, way: str, start: int) -> bool:
        """Whether every reading from block `start` on reads replaced keys and replaced values."""
        for module, names in self.reads(way).items():
            if (hook_names.layer(f"{module}.") or 0) >= start:
                hit = {name[-1] for name in names if name in self.replaced}
                if hit != {"k", "v"}:
                    return False
        return True

    def stream_start(self, way: str) -> int | None:
        """The last block before which the pathway's whole residual stream is replaced."""
        return max(self.stream_starts(way), default=None)

    def stream_starts(self, way: str) -> list[int]:
        """The blocks before which the pathway's whole residual stream is replaced; its length stands for the end."""
        starts = [0] if f"{way}.hook_tokens" in self.replaced else []
        for name in self.replaced:
            for leaf, after in (("hook_resid_pre", 0), ("hook_resid_post", 1)):
                number = hook_names.layer(name)
                if number is not None and name == f"{way}.blocks.{number}.{leaf}":
                    starts.append(number + after)
        return starts

    def told(self, way: str, leaves: Iterable[str] = _TOLD) -> list[str]:
        """What the pathway is told of the observation and is not replaced."""
        names = [f"{way}.{leaf}" for leaf in leaves]
        return [name for name in names if name in self.points and name not in self.dead | self.replaced]

    def expert_cut(self) -> str | None:
        """Cuts in the expert."""
        conditions = {n for n, p in self.points.items() if n == "expert.hook_condition" and "d_condition" in p.axes}
        if conditions:
            return "all that the expert is told" if conditions <= self.replaced else None
        start, told = self.stream_start("expert"), [f"expert.{leaf}" for leaf in _TOLD]
        if start is not None and self.reads_cut("expert", start):
            return f"the whole residual stream of the expert at block {start}, and all that it reads from there on"
        if (self.reads("expert") or set(told) & set(self.points)) and not self.told("expert"):
            return "everything that the expert reads" if self.reads_cut("expert", 0) else None
        return None

    def head_cut(self) -> str | None:
        """Cuts behind everything else."""
        last = [f"expert.{leaf}" for leaf in _LAST] + ["head.hook_actions", "head.hook_action_tokens"]
        if "expert.hook_noise" not in self.points:
            # elsewhere the predicted noise may go on beside it
            last.append("expert.hook_clean_actions")
        found = next((name for name in last if name in self.replaced), None)
        if found is None and self.stream_start("head") is not None:
            return "the whole residual stream of the head"
        return None if found is None else f"{found}, of which alone the actions are made"

    def entrance_cut(self) -> str | None:
        """Cuts before the expert, or before decoding."""
        by_layer = any(
            hook_names.same_tensor_as(name) in self.points and hook_names.leaf(name).startswith("hook_prefix")
            for name in self.points
        )
        for way in ("vlm", "encoder", "adapter"):
            start = self.stream_start(way)
            if start is None or (way == "vlm" and by_layer and 0 not in self.stream_starts(way)):
                continue
            later = [f"{way}.blocks.{i}.hook_deepstack" for i in range(start, len(self.points))]
            if any(name in self.points and name not in self.replaced for name in later):
                continue
            if not self.told("expert", [leaf for leaf in _TOLD if leaf not in _FROM_VLM]):
                return f"the whole residual stream of {way} at block {start}"
        return None
