"""Activations of rollouts with what was true at the time: for probes and subspaces, on policy.

`SegmentMeans` keeps one number a channel for each token segment, so that a recording of whole rollouts stays small;
`FrameRecorder` keeps what the policy saw, so that other models can be shown the same; `step_labels` says of every plan
what the simulator knew, and `labelled` joins it to the activations.

>>> with SegmentMeans(folder / "activations") as recorder:
...     watchers = [ActivationWatcher(recorder, "vlm.blocks.*.hook_resid_post"), FrameRecorder(folder / "frames")]
...     rollouts = run_rollouts(model, "goal", 36, seed=0, out=folder / "run", watchers=watchers)
>>> labels = step_labels(rollouts)
>>> x, y = labelled(ActivationRecording(folder / "activations"), labels, "vlm.blocks.2.hook_resid_post", "language")
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.inputs import PAD, Segments
from hooked_vla.rollouts.activation_reader import ActivationRecording
from hooked_vla.rollouts.activation_store import ActivationRecorder
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.records import Part, read_episodes, read_steps
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd

_STATE, _ACTION = "state_{}", "action_{}"


class SegmentMeans(ActivationRecorder):
    """An ActivationRecorder that keeps the mean of each token segment in place of its tokens.

    A value [row token ...] becomes [row segment ...], its segments one token each: it is read as any other recording.
    A mean over several segments then counts them equally, however many tokens they had. Values without a token axis, or
    with several, are kept as they are.
    """

    def put(
        self,
        episode: int,
        env_step: int,
        denoise_step: int | None,
        site: str,
        axes: Sequence[str],
        value: Tensor,
        segments: Mapping[str, Segments] | None = None,
    ) -> None:
        """As ActivationRecorder.put."""
        given = dict(segments or {})
        if len(given) == 1 and tuple(axes).index(next(iter(given))) == 1:
            axis, table = next(iter(given.items()))
            value, pooled = segment_means(value, table)
            given = {axis: pooled}
        super().put(episode, env_step, denoise_step, site, axes, value, given)


def segment_means(value: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The mean of each segment's tokens, and the segments of what comes out: one token each, in the order of names.

    value: [row token ...]. A row without a segment that others have is 0 there, marked as padding.
    """
    labels = segments.labels.to(value.device)
    names = [name for name in segments.names if name != PAD and bool((labels == segments.names.index(name)).any())]
    parts, owners = [], []
    pad = len(names)
    for i, name in enumerate(names):
        mask = (labels == segments.names.index(name)).to(value.dtype)
        counts = mask.sum(1)
        weights = mask / counts.clamp(min=1)[:, None]
        parts.append((weights.view(*weights.shape, *[1] * (value.ndim - 2)) * value).sum(1))
        owners.append(torch.where(counts > 0, i, pad))
    return torch.stack(parts, 1), Segments((*names, PAD), torch.stack(owners, 1).cpu(), segments.row_axis)


@dataclass(frozen=True, eq=False)
class KeptFrame:
    """What a policy saw when it planned: see FrameRecorder. frame: {"pixels", "state", "instruction"}."""

    episode: int
    env_step: int
    task: str
    seed: int
    frame: Mapping[str, Any]


class FrameRecorder(Watcher):
    """Keeps what the policy sees when it plans: FOLDER/000000012.npz, all plans of episode 12.

    n_action_steps: how many steps are executed of each plan. A file appears when its episode is over, before that
    counts as recorded; an episode that has one already is left as it is.
    """

    def __init__(self, folder: str | Path, n_action_steps: int) -> None:
        if n_action_steps < 1:
            raise ValueError(f"n_action_steps must be at least 1, got {n_action_steps}")
        self.folder, self.n_action_steps = Path(folder), n_action_steps
        self._open: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Keep the observation of a plan's first step."""
        if env_step == 0:
            # a group that was interrupted begins again
            self._open[cell.id] = []
        if env_step % self.n_action_steps == 0:
            self._open[cell.id].append((env_step, before))

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        """Write the episode's frames."""
        cell, path = part.cell, self._path(part.cell.id)
        plans = self._open.pop(cell.id, [])
        if path.is_file() or not plans:
            return
        cameras = list(plans[0][1]["pixels"])
        arrays: dict[str, Any] = {
            f"pixels/{camera}": np.stack([frame["pixels"][camera] for _, frame in plans]) for camera in cameras
        }
        arrays["state"] = np.stack([frame["state"] for _, frame in plans])
        arrays["env_step"] = np.array([step for step, _ in plans])
        arrays["instruction"] = np.array([frame["instruction"] for _, frame in plans])
        arrays["task"], arrays["seed"] = np.array(cell.task), np.array(cell.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, episode: int) -> Path:
        return self.folder / f"{episode:09d}.npz"


def read_frames(folder: str | Path, episodes: Sequence[int] | None = None) -> list[KeptFrame]:
    """The frames that a FrameRecorder kept, by episode and environment step; episodes: only these.

    Raises FileNotFoundError for a folder without frames, KeyError for an episode that has none.
    """
    files = {int(path.stem): path for path in sorted(Path(folder).glob("*.npz"))}
    if not files:
        raise FileNotFoundError(f"no frames in {folder}")
    wanted = list(files) if episodes is None else list(episodes)
    if missing := [each for each in wanted if each not in files]:
        raise KeyError(f"episodes {missing[:10]} have no frames in {folder}")
    found = []
    for episode in wanted:
        with np.load(files[episode]) as kept:
            arrays = {name: kept[name] for name in kept.files}
        pixels = {name.partition("/")[2]: value for name, value in arrays.items() if name.startswith("pixels/")}
        for i, env_step in enumerate(arrays["env_step"].tolist()):
            frame = {
                "pixels": {camera: images[i] for camera, images in pixels.items()},
                "state": arrays["state"][i],
                "instruction": str(arrays["instruction"][i]),
            }
            found.append(KeptFrame(episode, env_step, str(arrays["task"]), int(arrays["seed"]), frame))
    return found


def step_labels(rollouts: Rollouts, planned: bool = True) -> pd.DataFrame:
    """What the simulator knew when the policy planned (planned False: at every step), one row each.

    episode, env_step, suite, arm, task, seed; success: of the episode, in the end; n_steps: its length; phase;
    state_0...: proprioception; action_0...: the next action, in the robot's units; block, pad: what the task is to
    move, and to where, in the suites of the tabletop.
    Raises ValueError for rollouts that kept nothing.
    """
    if rollouts.folder is None:
        raise ValueError("these rollouts were not kept: run them with a folder")
    return folder_labels(rollouts.folder, planned)


def folder_labels(folder: str | Path, planned: bool = True) -> pd.DataFrame:
    """`step_labels` of the rollouts that were recorded in a folder.

    Raises FileNotFoundError for a folder without rollouts.
    """
    steps = read_steps(folder).drop_columns(["poses", "success", "reward"]).to_pandas()
    if planned:
        steps = steps[steps["chunk_step"] == 0]
    whole = read_episodes(folder).to_pandas()[["episode", "suite", "arm", "task", "seed", "success", "n_steps"]]
    table = steps[["episode", "env_step", "phase"]].merge(whole, on="episode", how="left", validate="many_to_one")
    for form, column in ((_STATE, "state"), (_ACTION, "action")):
        for i, numbers in enumerate(np.stack(list(steps[column])).T):
            table[form.format(i)] = numbers.astype(np.float64)
    targets = {pair: _target(*pair) for pair in set(zip(table["suite"], table["task"], strict=True))}
    for name in ("block", "pad"):
        table[name] = [targets[pair].get(name) for pair in zip(table["suite"], table["task"], strict=True)]
    return table.reset_index(drop=True)


def states(labels: pd.DataFrame) -> Float[np.ndarray, "n d_state"]:
    """The state columns of `step_labels`."""
    return _columns(labels, "state_")


def actions(labels: pd.DataFrame) -> Float[np.ndarray, "n d_action"]:
    """The next-action columns of `step_labels`."""
    return _columns(labels, "action_")


class Labelled(NamedTuple):
    """x: activations [n d]; labels: a row of `step_labels` for each, with denoise_step where the site has several."""

    x: Float[Tensor, "n d"]
    labels: pd.DataFrame


def labelled(
    recording: ActivationRecording,
    labels: pd.DataFrame,
    site: str,
    segment: str | None = None,
    token: int | None = None,
    denoise_step: int | None = None,
) -> Labelled:
    """Activations of one site, one vector for each row of `labels` that was recorded, in their order.

    segment: name or glob of the tokens that count, all where None; token: one of these, counted from 0 (negative: from
    the end); None: their mean. What a token holds besides (heads) is one vector. denoise_step: which, of sites that
    have them.
    Raises KeyError for a site, denoise step or segment that was not recorded, and where no row of `labels` was;
    ValueError for a token axis that is not the second, and a token that a row does not have.
    """
    return labelled_segments(recording, labels, site, [segment], token, denoise_step)[segment]


def labelled_segments(
    recording: ActivationRecording,
    labels: pd.DataFrame,
    site: str,
    segments: Sequence[str | None],
    token: int | None = None,
    denoise_step: int | None = None,
) -> dict[str | None, Labelled]:
    """`labelled` for several segments, reading the recording once. Raises as `labelled`."""
    places = list(zip(labels["episode"].astype(int), labels["env_step"].astype(int), strict=True))
    keys, wanted = recording.keys(site), set(places)
    chosen = [key for key in keys if key[:2] in wanted and key[2] == denoise_step]
    if not chosen:
        steps = sorted({key[2] for key in keys if key[2] is not None})
        raise KeyError(f"nothing of {site} at denoise step {denoise_step} for these rows; recorded steps: {steps}")
    vectors: dict[tuple[int, int], list[Tensor]] = {}
    for key in chosen:
        value, table = recording.get(key[0], key[1], site, key[2]), recording.segments(key[0], key[1], site, key[2])
        vectors[key[0], key[1]] = [pool(value, table, segment, token, site) for segment in segments]
    rows = labels.loc[[place in vectors for place in places]].reset_index(drop=True)
    if denoise_step is not None:
        rows["denoise_step"] = denoise_step
    kept = [vectors[place] for place in places if place in vectors]
    return {segment: Labelled(torch.stack([each[i] for each in kept]), rows) for i, segment in enumerate(segments)}


def pool(
    value: Float[Tensor, "row token *channel"], segments: Segments, segment: str | None, token: int | None, where: str
) -> Float[Tensor, " d"]:
    """One vector of one batch row's value (which has several rows where they are its camera images).

    Arguments as for `labelled`; where: what messages call the value.
    """
    if value.ndim < 3 or tuple(segments.labels.shape) != tuple(value.shape[:2]):
        raise ValueError(f"{where} is {list(value.shape)}: a token axis must be its second")
    counted = segments.labels != (segments.names.index(PAD) if PAD in segments.names else -1)
    mask = counted if segment is None else segments.mask(segment)
    tokens = value.flatten(2)[mask.to(value.device)]
    if token is None:
        if not len(tokens):
            raise ValueError(f"{where}: this row has no token of {segment or 'any segment'}")
        return tokens.float().mean(0)
    if not -len(tokens) <= token < len(tokens):
        raise ValueError(f"{where}: token {token} of {segment or 'all'}, but this row has {len(tokens)}")
    return tokens[token].float()


def _columns(labels: pd.DataFrame, start: str) -> np.ndarray:
    names = [name for name in labels.columns if name.startswith(start)]
    if not names:
        raise KeyError(f"the labels have no columns {start}0, ...; they have {list(labels.columns)}")
    return labels[sorted(names, key=lambda name: int(name.removeprefix(start)))].to_numpy(np.float64)


def _target(suite: str, task: str) -> dict[str, str]:
    """What a task of the tabletop is to move, and to where."""
    from hooked_vla.rollouts.tabletop.tasks import TASKS, find_task

    if suite not in TASKS:
        return {}
    found = find_task(suite, task)
    return {"block": found.block, "pad": found.pad}
