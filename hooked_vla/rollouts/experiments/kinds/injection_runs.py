"""What the experiments on injection share: recorded donors, prompts that say nothing, and how episodes are set against
their sources.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import resolve
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions.injection import Injection
from hooked_vla.interventions.injection_reach import CUT_SET, DEAD_END, REPLAY, Reach, find_reach
from hooked_vla.interventions.injection_sites import choose_sites
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.cells import Scene, spread_scenes
from hooked_vla.rollouts.experiments.compare import Normalize, Runs, cosine, join, override, read_runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import settings_in
from hooked_vla.rollouts.injection import MAX_BYTES, Source, load_donors, open_recording, sources_of
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Options, constant_text
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

# with the noise, what the expert has seen is all that actions are made of
NOISE = "expert.hook_noisy_actions"
# words that name neither thing nor place; the first of which a tokenizer makes one token each is repeated
FILLERS = ("the", "a", "it", "and")


@dataclass(frozen=True)
class Recorded:
    """Episodes whose activations were kept. folder: of the recording; runs: how they went."""

    folder: Path
    sources: tuple[Source, ...]
    runs: Runs

    @property
    def scenes(self) -> list[Scene]:
        return [source.scene for source in self.sources]

    def length(self, episode: int) -> int:
        """Environment steps of an episode."""
        return len(self.runs.actions[self.row(episode)])

    def row(self, episode: int) -> int:
        """Row of an episode in `runs`."""
        return self.runs.episodes["episode"].tolist().index(episode)


def record(
    context: Context, label: str, suite: str, sites: Sequence[str], episodes: int, options: Options,
    tasks: Sequence[str] | None = None,
) -> Recorded:  # fmt: skip
    """The suite's episodes without any edit, with everything that these sites held."""
    about = {"model": context.model_name, "suite": suite, "seed": context.seed, "tasks": tasks and list(tasks)}
    with ActivationRecorder(context.folder(label), about) as recorder:
        watcher = ActivationWatcher(recorder, list(sites))
        done = context.rollouts(label, suite, (BASELINE,), episodes, tasks, [watcher], options=options)
    return Recorded(context.folder(label), tuple(sources_of(done.episodes)), read_runs(done))


def scenes_of(context: Context, suite: str, episodes: int, tasks: Sequence[str] | None = None) -> list[Scene]:
    """The scenes of rollouts of the suite in this run."""
    names = [task.id for task in get_suite(suite).tasks] if tasks is None else tasks
    return list(spread_scenes(names, episodes, context.seed))


def turned_tasks(suite: str, shift: int) -> list[str]:
    """The suite's tasks, each in the place of the one that stands `shift` before it: with the same seeds, every scene
    has another task then.

    Raises ValueError where a task would take its own place.
    """
    tasks = [task.id for task in get_suite(suite).tasks]
    if shift % len(tasks) == 0:
        raise ValueError(f"shift={shift} gives every one of the {len(tasks)} tasks of {suite!r} its own place")
    return [*tasks[shift % len(tasks) :], *tasks[: shift % len(tasks)]]


def sites_in(model: HookedVLA, texts: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Hook points by text, as `choose_sites` takes them; and what the model does not have, in words."""
    found, lacking = {}, []
    for text in texts:
        try:
            found[text] = choose_sites(model, text)
        except ValueError as error:
            lacking.append(f"{text} was not run: {error}")
    return found, lacking


def with_noise(model: HookedVLA, sites: Sequence[str]) -> list[str]:
    """The sites, and the noise that the model's actions start from, where it has that: a donor of another seed is
    replayed only from its own."""
    return [*sites, NOISE] if NOISE in model.points else list(sites)


# Prompts that say nothing.


def inputs_of(context: Context, suite: str, frame: Mapping[str, Any], text: str | None = None) -> ModelInputs:
    """What an environment shows, as the model gets it in rollouts; text: told in place of its instruction."""
    settings = settings_in(context, suite, context.options)
    with constant_text(context.model.processor, settings.constant_text):
        return prepare(context.model, settings, [frame if text is None else {**frame, "instruction": text}])


def count_tokens(inputs: ModelInputs) -> int:
    """Tokens of the first row's prompt, without padding. Raises ValueError for a model that reads no text."""
    mask = getattr(inputs, "token_mask", None)
    if mask is None:
        raise ValueError("the model reads no text: its prompt cannot be replaced")
    return int(mask[0].sum())


def filler_prompt(count: Callable[[str], int], instruction: str) -> str:
    """A prompt that says nothing and has as many tokens as an instruction. count: tokens of a prompt.

    Networks hide padding: what is injected where the empty prompt has padding would never be seen.
    Raises ValueError where no repeated word gives that number.
    """
    wanted = count(instruction)
    for word in FILLERS:
        for n in range(1, wanted + 1):
            text = " ".join([word] * n)
            found = count(text)
            if found == wanted:
                return text
            if found > wanted:
                break
    raise ValueError(f"none of {FILLERS}, repeated, has the {wanted} tokens of {instruction!r}")


def fillers(context: Context, suite: str, scenes: Sequence[Scene]) -> dict[Scene, str]:
    """`filler_prompt` for every scene, by its task."""
    frame = context.observations(suite, 1)[0].frame

    @cache
    def count(text: str) -> int:
        return count_tokens(inputs_of(context, suite, frame, text))

    told = {task.id: task.instruction for task in get_suite(suite).tasks}
    texts = {task: filler_prompt(count, told[task]) for task in dict.fromkeys(scene.task for scene in scenes)}
    return {scene: texts[scene.task] for scene in scenes}


# Episodes beside their sources.


def _pick(runs: Runs, rows: Sequence[int], arms: Sequence[str]) -> Runs:
    """Some episodes of a sweep, under other names of arms."""
    states, actions, chunks = ([each[row] for row in rows] for each in (runs.states, runs.actions, runs.chunks))
    return Runs(runs.episodes.iloc[list(rows)].assign(arm=list(arms)), states, actions, chunks)


def cut(runs: Runs, lengths: Sequence[int]) -> Runs:
    """Every episode as far as its first so many steps: where it stood when its source had ended."""
    return Runs(
        runs.episodes,
        [states[: n + 1] for states, n in zip(runs.states, lengths, strict=True)],
        [actions[:n] for actions, n in zip(runs.actions, lengths, strict=True)],
        [chunks[:n] for chunks, n in zip(runs.chunks, lengths, strict=True)],
    )


def rows_of(runs: Runs, arm: str) -> list[int]:
    """Rows of an arm's episodes. Raises KeyError for an arm without any."""
    found = np.flatnonzero(runs.episodes["arm"] == arm).tolist()
    if not found:
        raise KeyError(f"no episodes of the arm {arm!r}")
    return found


def scene_of(runs: Runs, row: int) -> Scene:
    return Scene(str(runs.episodes["task"].iloc[row]), int(runs.episodes["seed"].iloc[row]))


def overrides(
    runs: Runs, donors: Mapping[str, tuple[Recorded, Mapping[Scene, int]]], layout: Any, normalize: Normalize
) -> pd.DataFrame:
    """`override` of every arm's episodes, each as far as its source went; donors: of every arm, whose order is kept.

    What comes after the source's last step is not the source's doing.
    """
    own = {scene_of(runs, row): row for row in rows_of(runs, BASELINE.name)}
    parts = []
    for arm, (source, found) in donors.items():
        rows = rows_of(runs, arm)
        both = [*rows, *(own[scene_of(runs, row)] for row in rows)]
        lengths = [source.length(found[scene_of(runs, row)]) for row in both]
        mine = cut(_pick(runs, both, [arm] * len(rows) + ["own"] * len(rows)), lengths)
        theirs = _pick(source.runs, range(len(source.runs.episodes)), ["source"] * len(source.runs.episodes))
        triples = [(i, len(both) + source.row(found[scene_of(runs, row)]), len(rows) + i)
                   for i, row in enumerate(rows)]  # fmt: skip
        parts.append(override(join(mine, theirs), triples, layout, normalize))
    return pd.concat(parts, ignore_index=True)


def likeness(
    runs: Runs, arm: str, source: Recorded, donors: Mapping[Scene, int], layout: Any, normalize: Normalize
) -> dict[str, Any]:
    """How an arm's episodes are like their donors': cosine (mean of the episodes, and the least) of normalised actions
    over the common steps, share of the episodes whose actions are the donor's bit for bit (identical), distance of the
    end effector from where the donor ended, when it did (to_source, metres), and success."""
    cosines, same, ends = [], [], []
    mine = rows_of(runs, arm)
    for row in mine:
        donor = source.row(donors[scene_of(runs, row)])
        pair = runs.actions[row], source.runs.actions[donor]
        cosines.append(cosine(normalize(pair[0]), normalize(pair[1]), layout))
        n = min(len(each) for each in pair)
        same.append(bool(np.array_equal(pair[0][:n], pair[1][:n])))
        last = min(len(source.runs.states[donor]), len(runs.states[row])) - 1
        places = [states[i, list(layout.state_position)]
                  for states, i in ((runs.states[row], last), (source.runs.states[donor], -1))]  # fmt: skip
        ends.append(float(np.linalg.norm(places[0] - places[1])))
    return {
        "n": len(mine),
        "cosine": float(np.mean(cosines)),
        "least_cosine": float(np.min(cosines)),
        "identical": float(np.mean(same)),
        "to_source": float(np.mean(ends)),
        "success": float(runs.episodes["success"].iloc[mine].mean()),
    }


def gate(runs: Runs, limit: float, arm: str = BASELINE.name) -> str | None:
    """Why nothing is judged: an arm succeeds too seldom; None where it does not."""
    success = float(runs.episodes["success"].iloc[rows_of(runs, arm)].mean())
    return None if success >= limit else f"the arm {arm!r} succeeds in {success:.0%}: a floor effect, not judged"


# What an injection can show.


@dataclass(frozen=True)
class Starts:
    """How the first and the last episode of a suite start, as the model's inputs. prompted: the first one with another
    prompt; None for a model that reads none. seed: the first one's."""

    first: ModelInputs
    second: ModelInputs
    prompted: ModelInputs | None
    seed: int


def starts_of(context: Context, suite: str, episodes: int, text: str | None = None) -> Starts:
    """The first and the last of the episodes' starts; text: what both are told, None for their own instructions.

    Where the second's own has another number of tokens than the first's, both are told the first's: masks, which no
    injection reaches, would tell them apart. Whether they do is what `prompted` tries: it is told the own instruction
    in place of `text`, or else one of the suite's that has another number of tokens, where there is such.
    """
    seen = context.observations(suite, episodes)
    here, there = seen[0].frame, seen[-1].frame
    first, second = (inputs_of(context, suite, frame, text) for frame in (here, there))
    if not hasattr(first, "token_mask"):
        return Starts(first, second, None, seen[0].seed)
    own = here["instruction"]
    if text is not None:
        return Starts(first, second, inputs_of(context, suite, here, own), seen[0].seed)
    if count_tokens(first) != count_tokens(second):
        second = inputs_of(context, suite, there, own)
    others = [task.instruction for task in get_suite(suite).tasks if task.instruction != own]
    prompted = [inputs_of(context, suite, here, each) for each in others]
    prompted.sort(key=lambda inputs: count_tokens(inputs) == count_tokens(first))
    return Starts(first, second, prompted[0] if prompted else None, seen[0].seed)


def reach_of(context: Context, source: Recorded, episode: int, injection: Injection, starts: Starts) -> Reach:
    """What an injection from a recorded episode's first step shows, by running starts as rollouts would."""
    model = context.model
    sites = resolve(list(injection.sites), list(model.points))
    donor = load_donors(open_recording(source.folder), [episode], sites, injection, MAX_BYTES, "reach")[episode]
    noise = SeededNoise.of(model, starts.first)([starts.seed], 0)
    return find_reach(model, injection, donor, starts.first, starts.second, noise, 0, starts.prompted)


def reach_row(found: Reach) -> dict[str, Any]:
    """What was found as columns: what names tell (cut_set, dead_end_by_name), what running shows (label; cuts_prompt:
    two starts that differ in the prompt alone lead to the same actions), and whether these agree."""
    return {
        "cut_set": found.cut or "", "label": found.label, "cuts_prompt": bool(found.cuts_prompt),
        "dead_end_by_name": found.dead_end, "agrees": found.agrees,
    }  # fmt: skip


MEANING = {
    REPLAY: "other scenes and other prompts of this run lead to the same actions, bit for bit: they are made of the "
    "donor's values, and are no evidence of what the model does with what it sees",
    CUT_SET: "other scenes lead to the same actions, bit for bit, but another prompt does not: the mask that hides "
    "padding still tells how long it is, and no injection reaches that",
    DEAD_END: "no action depends on what is replaced: what comes out is the run without injection",
}


def prompt_badge(names: Sequence[str], comes_back: str) -> list[str]:
    """What a reader must know of injections under which prompts make no difference. comes_back: what that leads to."""
    said = f"prompt cut (prompts alone make no difference, but what else is seen does; here that is {comes_back})"
    return [f"{said}: {', '.join(names)}"] if names else []


def badges(found: Iterable[tuple[str, str]]) -> list[str]:
    """What a reader must know first. found: an injection's name, and its label."""
    by_label: dict[str, list[str]] = {}
    for name, label in found:
        by_label.setdefault(label, []).append(name)
    return [f"{label} ({text}): {', '.join(by_label[label])}" for label, text in MEANING.items() if label in by_label]
