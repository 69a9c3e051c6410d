"""How height and speed of episodes differ from the baseline's, in the direction that a word says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from jaxtyping import Float

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import RERUN, join, mean_with_interval, read_runs
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# neurons by their value vectors, by their activations under two prompts, and by chance; the word itself
NEURONS, CONTRAST, RANDOM, PROMPT = "value vectors", "contrast", "random", "prompt"
SAID, UNSAID = "opposite said", "nothing said"
HEIGHT, SPEED = "height", "speed"
UNITS = {HEIGHT: "m", SPEED: "m a step"}


@dataclass(frozen=True)
class Style:
    """What a word says. task: whose instruction has it; opposite: whose episodes it is to change; sign: which way."""

    task: str
    opposite: str
    measure: str
    sign: int


STYLES = {
    "high": Style("high", "low", HEIGHT, +1),
    "low": Style("low", "high", HEIGHT, -1),
    "quickly": Style("fast", "slow", SPEED, +1),
    "slowly": Style("slow", "fast", SPEED, -1),
}


def measures(states: Float[np.ndarray, "step d_state"]) -> dict[str, float]:
    """Mean height of an episode's cup, metres, and the length of its path over the number of steps."""
    cup = np.asarray(states, np.float64)[:, :3]
    path = np.linalg.norm(np.diff(cup, axis=0), axis=1)
    return {HEIGHT: float(cup[:, 2].mean()), SPEED: float(path.sum() / max(len(path), 1))}


def episode_shifts(word: str, main: Rollouts, again: Rollouts, about: Mapping[str, tuple[str, float]]) -> pd.DataFrame:
    """One row an episode. about: the kind and dose of every arm but the baseline.

    shift: the word's measure less that of the paired baseline, counted positive in the direction that the word says.
    held_out: judged, not used for choosing.
    """
    runs = join(read_runs(main), read_runs(again, {BASELINE.name: RERUN}))
    style, rows = STYLES[word], []
    for i, episode in enumerate(records(runs.episodes)):
        partner = runs.row(BASELINE.name, episode["task"], episode["seed"])
        values, base = (measures(runs.states[j]) for j in (i, partner))
        kind, dose = about.get(episode["arm"], (BASELINE.name, float("nan")))
        rows.append(
            {"word": word, "prompt": UNSAID if episode["task"].endswith("-unsaid") else SAID,
             "task": episode["task"], "arm": episode["arm"], "arm_kind": kind, "dose": dose, "seed": episode["seed"],
             "held_out": episode["seed"] % 2 == 1, "success": bool(episode["success"]), "measure": style.measure,
             "steps": int(episode["n_steps"]), "value": values[style.measure], "baseline": base[style.measure],
             "shift": style.sign * (values[style.measure] - base[style.measure])}
        )  # fmt: skip
    return pd.DataFrame(rows)


def references(shifts: pd.DataFrame) -> dict[str, float]:
    """What the word in the prompt does in place of the opposite one: mean shift by word."""
    found: dict[str, list[float]] = {}
    for row in records(shifts):
        if row["arm_kind"] == PROMPT and row["prompt"] == SAID:
            found.setdefault(row["word"], []).append(row["shift"])
    return {word: float(np.mean(each)) for word, each in found.items()}


def shift_table(shifts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row for every word, kind of prompt, kind of arm and dose: success, mean shift with its 95 % interval by
    scenes, steps, and the shift as a share of what the word in the prompt does where the opposite was said."""
    usual = references(shifts)
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in records(shifts):
        # a missing dose is not equal to itself
        dose = None if isnan(row["dose"]) else row["dose"]
        found.setdefault((row["word"], row["prompt"], row["arm_kind"], dose), []).append(row)
    rows = []
    for (word, prompt, kind, dose), part in found.items():
        wins = sum(row["success"] for row in part)
        low, high = wilson_interval(wins, len(part))
        shift = mean_with_interval([row["shift"] for row in part], [row["seed"] for row in part], seed)
        rows.append(
            {"word": word, "measure": STYLES[word].measure, "prompt": prompt, "arm_kind": kind,
             "dose": float("nan") if dose is None else dose, "n": len(part), "success": wins / len(part),
             "success_low": low, "success_high": high, "value": float(np.mean([row["value"] for row in part])),
             "shift": shift[0], "shift_low": shift[1], "shift_high": shift[2],
             "share_of_prompt": shift[0] / usual[word] if usual[word] else float("nan"),
             "steps": float(np.mean([row["steps"] for row in part]))}
        )  # fmt: skip
    return pd.DataFrame(rows)


def dose_figures(table: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Shift over dose for every word and kind of prompt: its neurons, random ones, and the prompt's as a line."""
    rows = records(table)
    words = list(dict.fromkeys(row["word"] for row in rows))
    figure = new_figure(1.2 + 2.9 * len(words), 5.6)
    panels = figure.subplots(2, len(words), squeeze=False, sharex=True)
    for column, word in enumerate(words):
        for line, prompt in enumerate((SAID, UNSAID)):
            mine = [row for row in rows if row["word"] == word and row["prompt"] == prompt]
            _draw(panels[line, column], mine)
            panels[line, column].set_title(f"“{word}” – {prompt}", fontsize=9)
        unit = UNITS[STYLES[word].measure]
        for line in (0, 1):
            panels[line, column].set_ylabel(f"shift of {STYLES[word].measure} ({unit})", fontsize=8)
        panels[1, column].set_xlabel("dose", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    caption = (
        "How far height or speed moves in the direction that a word says when its neurons are overwritten, with 95 % "
        "intervals by scenes; above: episodes told the opposite; below: episodes told no style."
    )
    return {"doses": (figure, caption)}


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    series = ((NEURONS, "neurons that speak for it"), (RANDOM, "random neurons"), (CONTRAST, "neurons active with it"))
    for i, (kind, label) in enumerate(series):
        mine = sorted((row for row in rows if row["arm_kind"] == kind), key=lambda row: row["dose"])
        doses = [row["dose"] for row in mine]
        axes.plot(doses, [row["shift"] for row in mine], color=COLOURS[i], marker=MARKERS[i], markersize=4, label=label)
        low, high = ([row[name] for row in mine] for name in ("shift_low", "shift_high"))
        axes.fill_between(doses, low, high, color=COLOURS[i], alpha=0.18, linewidth=0)
    for kind, label, style in ((PROMPT, "the word in the prompt", "--"), (RERUN, "rerun", ":")):
        for row in rows:
            if row["arm_kind"] == kind:
                axes.axhline(row["shift"], color="#555555", linestyle=style, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda dose, _: f"{dose:g}")
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
