"""What probes read at every site of a policy while it acts, beside shuffled labels, random weights, and metadata."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_vla import registry
from hooked_vla.analysis.probes import Controlled, Kind, Metric, ProbeScore, metadata_features, score_with_controls
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.activation_reader import ActivationRecording
from hooked_vla.rollouts.labelled import KeptFrame, SegmentMeans, actions, labelled, labelled_segments, states
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Settings, constant_text
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

GOAL, STATE, ACTION, SUCCESS = ("block", "pad"), "end effector", "next action", "success"
IMAGES = "image:*"
# fewer episodes of one outcome than this say nothing of what tells them apart
FEWEST = 5
_ROWS = 16
# pathways that know nothing of goals, and are probed at their end alone
_LAST_ONLY = ("vision",)


@dataclass(frozen=True, eq=False)
class Question:
    """What a probe is to read. y: of every row; groups: rows that are left out together; units: rows whose labels are
    shuffled together, None for single rows; within: rows whose means `r2` compares with; blind: what is known of each
    row without activations, by name."""

    label: str
    kind: Kind
    metric: Metric
    y: np.ndarray
    groups: Sequence[Any]
    units: Sequence[Any] | None
    within: Sequence[Any] | None
    blind: Mapping[str, np.ndarray]

    def score(self, x: Any, others: Mapping[str, Any], n_folds: int, n_shuffles: int, seed: int) -> Controlled:
        """The probe on activations x, beside its controls; others: what it is compared with besides."""
        return score_with_controls(
            x, self.y, self.groups, self.kind, self.metric, {**others, **self.blind}, self.units, n_shuffles,
            min(n_folds, len(set(self.groups))), self.within, seed=seed,
        )  # fmt: skip


def questions(labels: pd.DataFrame, pictures: Any = None) -> list[Question]:
    """What is asked of the activations of these plans (`step_labels`).

    pictures: what the image encoder holds, [row d], as a control; None: there is none. It is told nothing, so what it
    says of a goal is what the scene and the behaviour so far show.

    Goals are read on tasks that the probe has not seen: combinations of block and pad of which it knows both from other
    tasks. State and action are read on unseen tasks, and compared with each task's own mean. Success is read on unseen
    episodes, where at least FEWEST succeeded and failed.
    """
    tasks, episodes = labels["task"].tolist(), labels["episode"].tolist()
    clock = metadata_features({"env_step": labels["env_step"].to_numpy(float)})
    where = states(labels)
    seen = {} if pictures is None else {"pictures": np.asarray(pictures, np.float64)}
    shown = {"time": clock, "proprioception": where, **seen}
    found = [
        Question(goal, "logistic", "accuracy", labels[goal].to_numpy(object), tasks, episodes, None, shown)
        for goal in GOAL
    ]
    found.append(Question(STATE, "ridge", "r2", where[:, :3], tasks, None, tasks, {"time": clock, **seen}))
    moves = actions(labels)
    moving = moves[:, np.ptp(moves, axis=0) > 0]
    found.append(Question(ACTION, "ridge", "r2", moving, tasks, None, tasks, shown))
    outcomes = dict(zip(labels["episode"], labels["success"], strict=True)).values()
    if FEWEST <= sum(map(bool, outcomes)) <= len(outcomes) - FEWEST:
        told = metadata_features({"env_step": labels["env_step"].to_numpy(float), "task": tasks})
        won = labels["success"].to_numpy(bool).astype(int)
        found.append(Question(SUCCESS, "logistic", "auc", won, episodes, episodes, None, {"time and task": told}))
    return found


def probe_sites(model: HookedVLA, globs: Sequence[str]) -> list[str]:
    """Sites that match, in model order: those whose values have rows, tokens and channels; the image encoder's last.

    Globs that match nothing are passed over: not every family has every pathway. Raises ValueError where none is left.
    """
    points = model.points
    found: list[str] = []
    for name, point in points.items():
        shaped = point.axes[:1] in (("batch",), ("image",)) and point.axes[1:2] == ("seq",) and len(point.axes) == 3
        if shaped and any(name in _matches(glob, list(points)) for glob in globs):
            found.append(name)
    for way in _LAST_ONLY:
        mine = [name for name in found if hook_names.pathway(name) == way]
        found = [name for name in found if name not in mine[:-1]]
    if not found:
        raise ValueError(f"no site of {model.spec.name} matches {list(globs)}")
    return found


def segments_at(recording: ActivationRecording, site: str) -> list[str]:
    """Segments of a site's tokens that are probed: cameras together, every other one alone."""
    episode, env_step, step = recording.keys(site)[0]
    names = recording.segments(episode, env_step, site, step).present()
    return list(dict.fromkeys(IMAGES if name.startswith("image:") else name for name in names if name != "pad"))


def random_weights(model: HookedVLA, seed: int) -> HookedVLA:
    """A model of the same architecture and preprocessing whose weights are as PyTorch initialises them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = registry.build_network(model.spec).eval()
    return HookedVLA(model.spec, net, model.processor)


def record_again(
    model: HookedVLA, settings: Settings, frames: Sequence[KeptFrame], sites: Sequence[str], steps: Sequence[int],
    folder: Path,
) -> ActivationRecording:  # fmt: skip
    """What the sites of a model hold on frames that another one acted on, as it would have been recorded."""
    noise: SeededNoise | None = None
    with SegmentMeans(folder) as recorder:
        todo = [each for each in frames if each.episode not in recorder.finished]
        for start in range(0, len(todo), _ROWS):
            part = todo[start : start + _ROWS]
            with constant_text(model.processor, settings.constant_text), torch.no_grad():
                inputs = prepare(model, settings, [each.frame for each in part])
                noise = noise or SeededNoise.of(model, inputs.rows([0]))
                drawn = [noise([each.seed], each.env_step) for each in part]
                draws = [torch.cat(each) for each in zip(*drawn, strict=True)]
                _, cache = model.run_with_cache(inputs, list(sites), draws, at_steps=list(steps))
            recorder.add_cache(cache, [each.episode for each in part], [each.env_step for each in part])
    return ActivationRecording(folder)


def places(model: HookedVLA, sites: Sequence[str], steps: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    """Each site, at each of the denoise steps where it has them, in model order."""
    for site in model.points:
        if site in sites:
            yield from ((site, step) for step in (steps if hook_names.is_denoised(site) else (None,)))


@dataclass(frozen=True, eq=False)
class Scored:
    """One question at one place, with all controls."""

    site: str
    segment: str
    denoise_step: int | None
    label: str
    found: Controlled

    def row(self) -> dict[str, Any]:
        """As columns of a table."""
        found, probe = self.found, self.found.probe
        controls = {"shuffled labels": found.shuffled, **{name: each.score for name, each in found.baselines.items()}}
        return {
            "pathway": hook_names.pathway(self.site), "site": self.site, "segment": self.segment,
            "denoise_step": self.denoise_step, "label": self.label, "metric": probe.metric, "score": probe.score,
            "low": probe.low, "high": probe.high, "chance": probe.chance, "shuffled": found.shuffled,
            "selectivity": found.selectivity, "random_weights": controls["random weights"],
            "time": controls.get("time", controls.get("time and task")),
            "proprioception": controls.get("proprioception"), "pictures": controls.get("pictures"),
            "margin": found.margin, "best_control": max(controls, key=lambda name: controls[name]), "n": probe.n,
            "n_groups": probe.n_groups,
        }  # fmt: skip


def score_everything(
    model: HookedVLA,
    sites: Sequence[str],
    recording: ActivationRecording,
    other: ActivationRecording,
    labels: pd.DataFrame,
    steps: Sequence[int],
    n_folds: int,
    n_shuffles: int,
    seed: int,
) -> list[Scored]:
    """Each of these sites, every segment, denoise step and question, with the score and all controls.

    other: what a model with random weights held in the same plans.
    """
    asked = questions(labels, _pictures(recording, labels))
    blind: dict[tuple[str, str], ProbeScore] = {}
    rows = []
    for site, step in places(model, sites, steps):
        segments: list[str | None] = list(segments_at(recording, site))
        own = labelled_segments(recording, labels, site, segments, denoise_step=step)
        theirs = labelled_segments(other, labels, site, segments, denoise_step=step)
        for segment in segments:
            for question in asked:
                # what is known without activations is the same everywhere: it is scored once
                known = {name: each for (label, name), each in blind.items() if label == question.label}
                first = replace(question, blind={}) if known else question
                random = {"random weights": theirs[segment].x}
                found = first.score(own[segment].x, random, n_folds, n_shuffles, seed)
                blind |= {(question.label, name): found.baselines[name] for name in first.blind}
                whole = replace(found, baselines={**found.baselines, **known})
                rows.append(Scored(site, str(segment), step, question.label, whole))
    return rows


def _pictures(recording: ActivationRecording, labels: pd.DataFrame) -> Any:
    """The image encoder's mean token in every plan; None where it was not recorded."""
    sites = [site for site in recording.sites if hook_names.pathway(site) == "vision"]
    return labelled(recording, labels, sites[-1], IMAGES).x if sites else None


def _matches(glob: str, names: Sequence[str]) -> list[str]:
    try:
        return hook_names.resolve(glob, list(names))
    except KeyError:
        return []
