"""Recording what sites hold while episodes run, and reading it back: see activation_store.py for what is kept.

>>> with ActivationRecorder("activations") as recorder:
...     watcher = ActivationWatcher(recorder, "vlm.blocks.*.hook_resid_post")
...     run_rollouts(model, "goal", episodes=12, seed=0, out="run", watchers=[watcher])
>>> recording = ActivationRecording("activations")
>>> recording.get(episode=3, env_step=8, site="vlm.blocks.2.hook_resid_post")      # [1, tokens, d_model]
>>> recording.stack("vlm.blocks.2.hook_resid_post").values                          # [value, tokens, d_model]
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hooked_vla.hooks.cache import ROW_AXES
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import HookPoint
from hooked_vla.rollouts.activation_reader import ActivationRecording, Key, Stacked
from hooked_vla.rollouts.activation_store import ActivationRecorder
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Watcher

__all__ = ["ActivationRecorder", "ActivationRecording", "ActivationWatcher", "Key", "Stacked"]


class ActivationWatcher(Watcher):
    """Records sites of the policy while episodes run, each under its episode's number; edits have acted already.

    sites: as `model.add_hook` takes them. denoise_steps, env_steps: only these (the policy runs at multiples of the
    number of steps that it executes); None: all. A recording is of one run, whose episode numbers it uses; episodes
    that are in it already are left as they are, so that an interrupted run goes on. The recorder is the caller's to
    close. Watching attention scores or patterns makes the model compute them step by step, which may change the last
    bits of what follows.
    """

    def __init__(
        self,
        recorder: ActivationRecorder,
        sites: NamesFilter,
        denoise_steps: Collection[int] | None = None,
        env_steps: Collection[int] | None = None,
    ) -> None:
        self.recorder, self.sites = recorder, sites
        self.denoise_steps = None if denoise_steps is None else frozenset(denoise_steps)
        self.env_steps = None if env_steps is None else frozenset(env_steps)
        self._n_rows = 0
        self._running: dict[int, int] = {}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """One hook at all sites; none where every episode is recorded already."""
        self._n_rows, self._running = len(rows), {}
        for row, cell in enumerate(rows):
            # rows that no episode has repeat the first one
            if cell.id not in self.recorder.finished:
                self._running.setdefault(cell.id, row)
        return [(self.sites, self._keep)] if self._running else []

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Nothing is kept of the environment: that is in the tables."""

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        """What was recorded of the episode is written before the episode counts as run."""
        if self._running.pop(part.cell.id, None) is not None:
            self.recorder.finish(part.cell.id)

    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        """Called by the model with a site's value."""
        env_step, denoise_step = hook.run.env_step, hook.denoise_step
        if env_step is None:
            raise RuntimeError(f"{hook.name} was recorded outside a rollout: there is no environment step")
        if self.env_steps is not None and env_step not in self.env_steps:
            return
        if denoise_step is not None and self.denoise_steps is not None and denoise_step not in self.denoise_steps:
            return
        value = value.detach().cpu()
        streams = {axis: hook.run.segments[stream] for axis, stream in hook.streams.items()}
        per_row = value.shape[0] // self._n_rows if hook.axes[0] in ROW_AXES else 0
        for episode, row in self._running.items():
            part = value[row * per_row : (row + 1) * per_row] if per_row else value
            segments = {axis: _rows_of(each, row, self._n_rows) for axis, each in streams.items()}
            self.recorder.put(episode, env_step, denoise_step, hook.name, hook.axes, part, segments)


def _rows_of(segments: Any, row: int, n_rows: int) -> Any:
    each = len(segments.labels) // n_rows
    return segments.rows(slice(row * each, (row + 1) * each))
