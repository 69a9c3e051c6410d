"""Neurons that speak for a word, held at a constant while the policy acts: does height or speed follow?

A word's neurons are found in the vocabulary alone, before anything is run. They are overwritten in the style suite, in
episodes that are told the opposite style and in episodes that are told none (whose demonstrations had every style).
Beside them: as many random neurons, the word itself in the prompt, and a rerun. The dose is chosen on half of the
episodes and judged on the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.analysis.lens import (
    Vocabulary,
    cluster_neurons,
    find_neurons,
    neuron_sites,
    read_vocabulary,
    words_of,
)
from hooked_vla.analysis.neurons import Neurons, activation_scales, contrast_neurons
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import layer
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions import EditArm
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.experiments.compare import GATE, RERUN, mean_with_interval, rerun
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import decide, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import records, settings_in, threshold
from hooked_vla.rollouts.experiments.kinds.neurons_shifts import (
    CONTRAST,
    NEURONS,
    PROMPT,
    RANDOM,
    SAID,
    STYLES,
    UNSAID,
    dose_figures,
    episode_shifts,
    references,
    shift_table,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd

SUITE = "style"
_N_CLUSTERS = 8
# episodes' starts on which activations are looked at
_N_STARTS = 8


@dataclass(frozen=True)
class Settings:
    """episodes: of each task and arm. words: of neurons_shifts.STYLES. n_neurons: of each word, the best among those
    that have it among their `n_top` tokens. doses: the constant, in multiples of the 99th percentile of the neurons'
    absolute activations (mean over layers). n_random: sets of as many random neurons. least_success: share of episodes
    in which the policy must still succeed for a shift to count as steering."""

    episodes: int
    words: tuple[str, ...]
    n_neurons: int
    n_top: int
    doses: tuple[float, ...]
    n_random: int
    least_success: float

    def __post_init__(self) -> None:
        if unknown := [word for word in self.words if word not in STYLES]:
            raise ValueError(f"no style of the tabletop is said by {unknown}; words: {list(STYLES)}")


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without a vocabulary, or one that does not have the words."""
    model = context.model
    if not context.reads_words:
        raise ValueError(f"{context.model_name} reads no words: no neuron can speak for one")
    tokenizer = model.processor.tokenizer.load()
    n_words = getattr(getattr(model.net, "vlm", None), "embed", None)
    words = words_of(tokenizer, n_words.num_embeddings) if n_words is not None else ()
    vocabulary = read_vocabulary(model, words, source="embed")
    tables = [_neurons_of(context, vocabulary, word, settings) for word in settings.words]
    neurons = context.table("neurons", lambda: pd.concat(tables, ignore_index=True))
    tables = [_contrasts_of(context, word, settings) for word in settings.words]
    contrasts = context.table("contrasts", lambda: pd.concat(tables, ignore_index=True))
    unit = _unit(context)
    parts = [
        _run_word(context, settings, word, {NEURONS: _chosen(neurons, word), CONTRAST: _chosen(contrasts, word)}, unit)
        for word in settings.words
    ]
    shifts = context.table("shifts", lambda: pd.concat(parts, ignore_index=True))
    table = shift_table(shifts, context.seed)
    clusters = context.table("clusters", lambda: _clusters(context, vocabulary))
    doses = best_doses(shifts, settings.least_success)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, shifts, doses, settings.least_success),
        tables={
            "neurons": neurons,
            "contrasts": contrasts,
            "clusters": clusters,
            "unit": pd.DataFrame([{"dose": 1.0, "activation": unit}]),
        },
        figures=dose_figures(table),
        notes=_notes(context, settings, unit, table),
    )


def _neurons_of(context: Context, vocabulary: Vocabulary, word: str, settings: Settings) -> pd.DataFrame:
    """A word's neurons, each once."""
    found = find_neurons(context.model, vocabulary, [word], n_top=settings.n_top)
    if len(found) < settings.n_neurons:
        raise ValueError(
            f"{len(found)} neurons have {word!r} among their {settings.n_top} tokens, fewer than the "
            f"{settings.n_neurons} that are asked for: raise n_top or lower n_neurons"
        )
    return found.head(settings.n_neurons).assign(keyword=word)


def _contrasts_of(context: Context, word: str, settings: Settings) -> pd.DataFrame:
    """As many neurons that are more active when the word is said than when its opposite is, in the same scenes."""
    tasks = {task.id: task.instruction for task in get_suite(SUITE).tasks}
    style = STYLES[word]
    both = [_starts(context, tasks[task]) for task in (style.task, style.opposite)]
    found = contrast_neurons(context.model, both[0], both[1], neuron_sites(context.model))
    return found.head(settings.n_neurons).assign(keyword=word)


def _starts(context: Context, instruction: str) -> ModelInputs:
    """How some episodes start, all with this instruction, as the model takes them."""
    frames = [{**each.frame, "instruction": instruction} for each in context.observations(SUITE, _N_STARTS)]
    return prepare(context.model, settings_in(context, SUITE, context.options), frames)


def _chosen(neurons: pd.DataFrame, word: str) -> Neurons:
    at: dict[str, tuple[int, ...]] = {}
    for row in records(neurons):
        if row["keyword"] == word:
            at[row["site"]] = (*at.get(row["site"], ()), int(row["neuron"]))
    return Neurons(at)


def _unit(context: Context) -> float:
    """What a dose of 1 is: the 99th percentile of absolute activations at episodes' starts, mean over sites."""
    plain = next(task.instruction for task in get_suite(SUITE).tasks if task.id.endswith("-unsaid"))
    scales = activation_scales(context.model, _starts(context, plain), neuron_sites(context.model))
    return float(sum(scale.high for scale in scales.values()) / len(scales))


def _run_word(
    context: Context, settings: Settings, word: str, chosen: Mapping[str, Neurons], unit: float
) -> pd.DataFrame:
    """Every episode's shift under every arm of one word. chosen: its neurons, by how they were found."""
    tasks = {task.id: task.instruction for task in get_suite(SUITE).tasks}
    style = STYLES[word]
    arms: dict[str, tuple[Arm, str, float]] = {
        PROMPT: (ToldArm(PROMPT, [Told(tasks[style.task])]), PROMPT, float("nan")),
    }
    sham = [chosen[NEURONS].random(context.model, seed) for seed in range(settings.n_random)]
    sets = [*chosen.items(), *((RANDOM, each) for each in sham)]
    for number, (kind, neurons) in enumerate(sets):
        for dose in settings.doses:
            name = f"{kind} {number - len(chosen) + 1}" if kind == RANDOM else kind
            arm = EditArm(f"{name} × {dose:g}", neurons.overwrite(dose * unit))
            arms[arm.name] = (arm, kind, dose)
    where = [style.opposite, f"{style.opposite}-unsaid"]
    episodes = settings.episodes * len(where)
    label = f"style_{word}"
    main = context.rollouts(label, SUITE, [BASELINE, *(arm for arm, _, _ in arms.values())], episodes, where)
    again = rerun(context, f"{label}_rerun", SUITE, episodes, where)
    about = {name: (kind, dose) for name, (_, kind, dose) in arms.items()} | {RERUN: (RERUN, float("nan"))}
    return episode_shifts(word, main, again, about)


Key = tuple[str, str, str]


def best_doses(shifts: pd.DataFrame, least: float) -> dict[Key, float]:
    """For every word, kind of prompt and way of finding neurons the dose with the largest mean shift, on the episodes
    for choosing, among those under which the policy still succeeds in a share `least` of them.

    Nothing for a word that has no such dose.
    """
    cells: dict[tuple[str, str, str, float], list[Mapping[str, Any]]] = {}
    for row in records(shifts):
        if row["arm_kind"] in (NEURONS, CONTRAST) and not row["held_out"]:
            cells.setdefault((row["word"], row["prompt"], row["arm_kind"], row["dose"]), []).append(row)
    best: dict[Key, tuple[float, float]] = {}
    for (word, prompt, kind, dose), rows in cells.items():
        works = sum(row["success"] for row in rows) / len(rows) >= least
        shift = sum(row["shift"] for row in rows) / len(rows)
        if works and shift > best.get((word, prompt, kind), (float("-inf"), 0.0))[0]:
            best[word, prompt, kind] = (shift, dose)
    return {key: dose for key, (_, dose) in best.items()}


def _verdicts(context: Context, shifts: pd.DataFrame, doses: Mapping[Key, float], least: float) -> list[Verdict]:
    """least: of success, for a dose that steers."""
    rows, usual = records(shifts), references(shifts)
    base = [row["success"] for row in rows if row["arm_kind"] == BASELINE.name]
    why = ""
    if sum(base) / len(base) < GATE:
        why = f"the baseline succeeds in {sum(base) / len(base):.0%}: a floor effect, not judged"
    elif weak := [word for word, shift in usual.items() if shift <= 0]:
        why = f"the words {weak} in the prompt do not shift what they say: there is no reference"
    if why:
        return [Verdict(rule, None, why) for rule in ("said-shift", "unsaid-weak")]
    (said, unsaid), (other, other_unsaid) = (
        [_judge(context, rows, usual, doses, least, prompt, found_by) for prompt in (SAID, UNSAID)]
        for found_by in (NEURONS, CONTRAST)
    )
    limits = [threshold(context, rule) for rule in ("said-shift", "unsaid-weak")]
    steers = said.steers(limits[0])
    text = f"{unsaid.text}. {_BESIDE}: {other_unsaid.text}"
    weak = None
    if not steers:
        text = f"it is not shown that they steer with style words, so that weak says nothing. {text}"
    elif unsaid.words:
        weak = decide(unsaid.low, unsaid.high, limits[1], below=True)
        text += undecided(weak)
    return [
        Verdict("said-shift", steers, f"{said.text}{undecided(steers)}. {_BESIDE}: {other.text}"),
        Verdict("unsaid-weak", weak, text),
    ]


_BESIDE = "Beside it, neurons that differ between the two prompts"


@dataclass(frozen=True)
class _Judged:
    """Mean shift of chosen neurons as a share of what the words in the prompt do, with its interval; beyond: by how
    much it exceeds that of random neurons in the same episodes, low end of the interval."""

    share: float
    low: float
    high: float
    beyond: float
    words: tuple[str, ...]
    text: str

    def steers(self, least: float) -> bool | None:
        """Whether the shift is as large as `least`, and above that of random neurons in the same episodes; None where
        its interval has `least` in it."""
        return decide(self.low, self.high, least, below=False) if self.beyond > 0 else False


def _judge(
    context: Context, rows: Sequence[Mapping[str, Any]], usual: Mapping[str, float], doses: Mapping[Key, float],
    least: float, prompt: str, found_by: str,
) -> _Judged:  # fmt: skip
    """The words with a dose that leaves the policy working, on held-out episodes; the others count as no shift, and so
    do those under whose dose it does not work in the held-out ones."""
    held_out = [
        row
        for row in rows
        if row["held_out"] and row["prompt"] == prompt and row["dose"] == doses.get((row["word"], prompt, found_by))
    ]
    won: dict[str, list[bool]] = {}
    for row in held_out:
        if row["arm_kind"] == found_by:
            won.setdefault(row["word"], []).append(row["success"])
    words = tuple(word for word in won if np.mean(won[word]) >= least)
    said = "; ".join(
        [f"the policy fails at every dose of {word}, which counts as no shift" for word in usual if word not in won]
        + [
            f"under {word} × {doses[word, prompt, found_by]:g} it succeeds in {np.mean(won[word]):.0%} of the held-out "
            "episodes, which counts as no shift"
            for word in won
            if word not in words
        ]
    )
    if not words:
        return _Judged(0.0, 0.0, 0.0, 0.0, (), f"there is nothing to steer: {said}")
    shares: dict[str, dict[tuple[str, int], list[float]]] = {found_by: {}, RANDOM: {}}
    for row in held_out:
        if row["word"] in words and row["arm_kind"] in shares:
            mine = shares[row["arm_kind"]].setdefault((row["word"], row["seed"]), [])
            mine.append(row["shift"] / usual[row["word"]])
    scenes = list(shares[found_by])
    both = np.array([[np.mean(shares[kind][scene]) for kind in (found_by, RANDOM)] for scene in scenes])
    of_word = {word: np.mean([both[i, 0] for i, scene in enumerate(scenes) if scene[0] == word]) for word in words}
    # what is asked is the mean over all words, those with a broken policy among them
    both *= len(words) / len(usual)
    names = [f"{word} {seed}" for word, seed in scenes]
    (share, low, high), random, apart = (
        mean_with_interval(each, names, context.seed) for each in (both[:, 0], both[:, 1], both[:, 0] - both[:, 1])
    )
    each = ", ".join(f"{word} × {doses[word, prompt, found_by]:g} {of_word[word]:+.0%}" for word in words)
    text = (
        f"{share:+.0%} ({low:+.0%} to {high:+.0%}) of what the word in the prompt does, random neurons "
        f"{random[0]:+.0%} ({random[1]:+.0%} to {random[2]:+.0%}), in the same episodes {apart[0]:+.0%} more "
        f"({apart[1]:+.0%} to {apart[2]:+.0%}); doses and their words' shares {each}"
    )
    return _Judged(share, low, high, apart[1], words, text + (f"; {said}" if said else ""))


def _clusters(context: Context, vocabulary: Vocabulary) -> pd.DataFrame:
    """What the neurons of every layer speak for, in groups."""
    rows = []
    for site in neuron_sites(context.model):
        found = cluster_neurons(context.model, vocabulary, site, _N_CLUSTERS, seed=0)
        for number, words in enumerate(found.words):
            size = int((found.of == number).sum())
            rows.append({"layer": layer(site), "cluster": number, "neurons": size, "words": " ".join(words)})
    return pd.DataFrame(rows)


def _notes(context: Context, settings: Settings, unit: float, table: pd.DataFrame) -> list[str]:
    vlm: Any = getattr(context.model.net, "vlm", None)
    head = getattr(vlm, "unembed", None)
    if head is None:
        read = "the model has no output layer over its vocabulary"
    elif head.weight is vlm.embed.weight:
        read = "they are tied to the output layer, and are the same numbers"
    else:
        read = "its output layer takes no part in acting, and training the policy did not touch it"
    by = (NEURONS, CONTRAST)
    lost = [row for row in records(table) if row["arm_kind"] in by and row["success"] < settings.least_success]
    notes = [
        f"Value vectors are read in the directions of the model's input embeddings: {read}.",
        f"A dose of 1 is an activation of {unit:.3g}, the 99th percentile of absolute activations at episodes' starts. "
        "A word's dose is the one with the largest shift on episodes of even seeds among those that leave the policy "
        f"at {settings.least_success:.0%} success; verdicts are on episodes of odd seeds, and a word under whose "
        "dose the policy succeeds less often than that in these counts as no shift.",
        "Beside the value vectors' neurons stand as many that are more active when the word is said than when its "
        "opposite is, in the same scenes: what steering by neurons can do here without a vocabulary.",
        "Neurons that no action depends on, such as those of a last block, are left out. Edits act on all tokens, at "
        "every plan.",
        "One policy was trained on demonstrations with style words and, in other episodes, without them (every style "
        "under one prompt). The published comparison trains a policy on the latter alone, which is not done here.",
        "Height is the mean height of the cup over an episode, speed the length of its path over the steps.",
    ]
    if context.model_name.endswith("-tabletop"):
        notes.append(
            "The shipped policies were trained by imitation alone: nothing ever made their language models say words, "
            "as pretraining does. That value vectors do not steer them says nothing against the claim on pretrained "
            "models."
        )
    if lost:
        each = ", ".join(
            f"{row['word']}, {row['arm_kind']} × {row['dose']:g} ({row['prompt']}: {row['success']:.0%})"
            for row in lost
        )
        notes.append(f"Success is below {settings.least_success:.0%} under {each}: that is damage, not steering.")
    return notes
