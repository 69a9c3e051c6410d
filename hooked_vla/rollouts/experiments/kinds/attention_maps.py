"""What attention maps are held against: moments of the tabletop with the place of every object, and scores over them.

Two moments of a scene: as it starts, when the target is the block; and on the way with the block in hand (the scripted
expert got it there), when the target is the pad. Masks come from the simulator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hooked_vla.analysis.attention import (
    CameraView,
    camera_attention,
    camera_views,
    pattern_sites,
    pointing_chance,
    pointing_hit,
    pointing_score,
    word_positions,
)
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import layer, pathway
from hooked_vla.inputs import ACTION, LANGUAGE, ModelInputs, Observation, image_segment
from hooked_vla.rollouts.cells import spread_scenes
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Settings as RolloutSettings
from hooked_vla.rollouts.settings import settle
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.tabletop import TASKS, TabletopEnv
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

APPROACH, CARRY = "approach", "carry"
# what names the two targets in an instruction; both words of either are read
WORDS, ACTIONS, ALL_TOKENS = "words", "actions", "all tokens"
TARGET_WORD = "target word"
_AT_ONCE = 8
# an object of fewer pixels is not to be seen
_LEAST = 4
_MOST_STEPS = 60


@dataclass(frozen=True, eq=False)
class Moment:
    """What the policy sees at one moment, and where objects are in it.

    masks: by the model's camera and the object's name; target: the object that is to be reached. word: its colour.
    """

    task: str
    seed: int
    phase: str
    images: Mapping[str, UInt8[np.ndarray, "height width 3"]]
    state: Float[np.ndarray, " d_state"]
    instruction: str
    masks: Mapping[str, Mapping[str, Bool[np.ndarray, "height width"]]]
    target: str
    word: str

    @property
    def others(self) -> list[str]:
        """Objects of the target's kind that are not meant."""
        mine = self.target.startswith("pad_")
        every = next(iter(self.masks.values()))
        return [name for name in every if name.startswith("pad_") == mine and name not in (self.target, "hand")]


def moments(context: Context, suite: str, n: int) -> list[Moment]:
    """Both moments of the first n scenes of the suite's rollouts.

    Raises ValueError for a suite that is not the tabletop's: only there are the places of objects in images known.
    """
    if suite not in TASKS:
        raise ValueError(f"masks of objects are known in the tabletop's suites {list(TASKS)}, not in {suite!r}")
    where = get_suite(suite)
    settings = settle(context.options, context.model_name, context.model, where)
    found = []
    scenes = spread_scenes([task.id for task in where.tasks], n, context.seed)
    for task in dict.fromkeys(scene.task for scene in scenes):
        env = TabletopEnv(suite, task, settings.image_size, ())
        try:
            for scene in scenes:
                if scene.task != task:
                    continue
                env.reset(seed=scene.seed)
                found.append(_moment(env, settings, scene.seed, APPROACH))
                for _ in range(_MOST_STEPS):
                    if env.holds and env.situation.to_pad > 0.08 and env.situation.cup[2] > 0.10:
                        found.append(_moment(env, settings, scene.seed, CARRY))
                        break
                    env.advance(env.expert_action())
        finally:
            env.close()
    return found


def _moment(env: TabletopEnv, settings: RolloutSettings, seed: int, phase: str) -> Moment:
    task, names = env.task, env.object_names
    masks = {}
    for camera, source in settings.cameras.items():
        shown = env.object_mask(source)
        masks[camera] = {name: shown == i for i, name in enumerate(names)}
    target, word = (task.block, task.block) if phase == APPROACH else (f"pad_{task.pad}", task.pad)
    images = {camera: env.image(source) for camera, source in settings.cameras.items()}
    return Moment(task.id, seed, phase, images, env.proprioception, task.instruction, masks, target, word)


def observation(chosen: Sequence[Moment]) -> Observation:
    """Several moments as one batch."""
    images = {camera: np.stack([each.images[camera] for each in chosen]) for camera in chosen[0].images}
    return Observation(images, np.stack([each.state for each in chosen]), [each.instruction for each in chosen])


@dataclass(frozen=True)
class Reader:
    """Who reads the images: a pathway's sites, and which of its tokens ask."""

    name: str
    sites: tuple[str, ...]
    queries: str


def readers(model: HookedVLA, inputs: ModelInputs) -> list[Reader]:
    """All that attends to image tokens behind the vision tower."""
    tables = model.segments(inputs)
    found = []
    for way in ("vlm", "adapter", "encoder", "expert"):
        if not any(point.pathway == way for point in model.points.values()):
            continue
        sites = []
        for site in pattern_sites(model, way, only_live=False):
            keys = model.points[site].streams["key"].split("+")
            if any(name.startswith(image_segment("")) for key in keys for name in tables[key].present()):
                sites.append(site)
        if not sites:
            continue
        own = tables[model.points[sites[0]].streams["query"]].present()
        if LANGUAGE in own and way != "expert":
            found += [Reader(f"{way}: {each}", tuple(sites), each) for each in (WORDS, TARGET_WORD)]
        elif ACTION in own:
            found.append(Reader(f"{way}: {ACTIONS}", tuple(sites), ACTIONS))
        else:
            found.append(Reader(f"{way}: {ALL_TOKENS}", tuple(sites), ALL_TOKENS))
    return found


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of moments: by reader, site and camera, [moment step head row column]; one step where the pathway runs
    once."""

    moments: Sequence[Moment]
    readers: Sequence[Reader]
    views: Mapping[str, CameraView]
    weights: Mapping[tuple[str, str, str], Float[Tensor, "moment step head row column"]]


@dataclass(frozen=True)
class Chosen:
    """A map of one pathway: what it stands for, who asks, at which site, which head (-1: their mean)."""

    pathway: str
    what: str
    reader: str
    site: str
    head: int

    @property
    def label(self) -> str:
        return f"{self.pathway} L{layer(self.site)}" + (f"H{self.head}" if self.head >= 0 else "")


@torch.no_grad()
def make_maps(context: Context, chosen: Sequence[Moment]) -> Maps:
    """The maps of every reader, site, head and camera; the policy's noise is that of the scene's episode."""
    model = context.model
    views = {view.source: view for view in camera_views(model, observation(chosen[:1])).values()}
    noise = SeededNoise.of(model, observation(chosen[:1]))
    who = readers(model, model.prepare(observation(chosen[:1])))
    sites = list(dict.fromkeys(site for reader in who for site in reader.sites))
    parts: dict[tuple[str, str, str], list[Tensor]] = {}
    for start in range(0, len(chosen), _AT_ONCE):
        batch = chosen[start : start + _AT_ONCE]
        inputs = model.prepare(observation(batch))
        _, cache = model.run_with_cache(inputs, sites, noise([each.seed for each in batch], 0))
        for reader in who:
            asking = _queries(model, inputs, reader, batch)
            for site in reader.sites:
                keys = cache.segments[cache.entries[cache[site].site].streams["key"]].present()
                for camera, view in views.items():
                    # some pathways read one camera only
                    if view.segment in keys:
                        weights = camera_attention(cache, site, view, asking).weights
                        parts.setdefault((reader.name, site, camera), []).append(weights)
    return Maps(chosen, who, views, {key: torch.cat(each) for key, each in parts.items()})


def _queries(model: HookedVLA, inputs: ModelInputs, reader: Reader, batch: Sequence[Moment]) -> Any:
    if reader.queries == TARGET_WORD:
        return word_positions(model, inputs, [[each.word] for each in batch])
    return {WORDS: LANGUAGE, ACTIONS: ACTION, ALL_TOKENS: None}[reader.queries]


def score_table(context: Context, maps: Maps) -> pd.DataFrame:
    """One row for every moment, camera, reader, site and head in which the target is to be seen.

    target: pointing score, 1 at chance. shuffled: mean score of the same mask under the head's maps of all other scenes
    at the same phase. other: mean score of objects of the target's kind that are not meant. hit, chance: of the
    pointing game. head -1: the mean over the site's heads. Maps are means over denoise steps.
    """
    sites = context.model.hook_points
    rows = []
    for (reader, site, camera), stepped in maps.weights.items():
        view, weights = maps.views[camera], stepped.mean(1)
        weights = torch.cat([weights.mean(1, keepdim=True), weights], dim=1)
        elsewhere = _of_other_scenes(weights, view, maps.moments)
        for i, moment in enumerate(maps.moments):
            mask = moment.masks[camera][moment.target]
            if (mask & view.seen).sum() < _LEAST:
                continue
            others = [moment.masks[camera][name] for name in moment.others]
            others = [each for each in others if (each & view.seen).sum() >= _LEAST]
            scores = {
                "target": pointing_score(weights[i], view, mask),
                "shuffled": pointing_score(elsewhere[i], view, mask),
                "other": _mean_score(weights[i], view, others),
                "hit": pointing_hit(weights[i], view, mask).float(),
            }
            about = {"task": moment.task, "seed": moment.seed, "phase": moment.phase, "camera": camera,
                     "reader": reader, "pathway": pathway(site), "site": site, "layer": layer(site),
                     "reaches_action": sites[site].reaches_action, "chance": pointing_chance(view, mask)}  # fmt: skip
            rows += [
                about | {"head": head - 1} | {name: float(each[head]) for name, each in scores.items()}
                for head in range(weights.shape[1])
            ]
    return pd.DataFrame(rows)


def _of_other_scenes(
    weights: Float[Tensor, "moment head row column"], view: CameraView, found: Sequence[Moment]
) -> Float[Tensor, "moment head row column"]:
    """For each moment the mean of all other scenes' maps at its phase, each as shares of the attention to what is seen:
    its score is then the mean of their scores."""
    seen = torch.from_numpy(view.counts(np.ones_like(view.seen)) > 0)
    shares = weights * seen / (weights * seen).sum((-2, -1), keepdim=True)
    means = []
    for moment in found:
        others = [i for i, each in enumerate(found) if each.phase == moment.phase and each.seed != moment.seed]
        if not others:
            raise ValueError(f"maps of other scenes need two scenes or more at the phase {moment.phase!r}")
        means.append(shares[others].mean(0))
    return torch.stack(means)


def step_table(maps: Maps, places: Mapping[str, tuple[str, str, int]], camera: str) -> pd.DataFrame:
    """Mean pointing score on the target at each denoise step, of heads by name: their reader, site and number."""
    rows = []
    for name, (reader, site, head) in places.items():
        weights, view = maps.weights[reader, site, camera][:, :, head], maps.views[camera]
        masks = [moment.masks[camera][moment.target] for moment in maps.moments]
        seen = [i for i, mask in enumerate(masks) if (mask & view.seen).sum() >= _LEAST]
        scores = torch.stack([pointing_score(weights[i], view, masks[i]) for i in seen]).mean(0)
        rows += [{"head": name, "denoise_step": step, "target": float(each)} for step, each in enumerate(scores)]
    return pd.DataFrame(rows)


def _mean_score(weights: Tensor, view: CameraView, masks: Sequence[np.ndarray]) -> Tensor:
    if not masks:
        return torch.full(weights.shape[:1], torch.nan)
    return torch.stack([pointing_score(weights, view, mask) for mask in masks]).mean(0)
