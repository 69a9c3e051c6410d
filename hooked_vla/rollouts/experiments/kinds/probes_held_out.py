"""What probes read beyond every control, at places that were chosen on other tasks than they are judged on.

The largest of many margins is large by chance alone. So the place of a label in a pathway is chosen by its margin on
half of the tasks, and its margin on the other half counts; then the other way round, and the two are averaged.
Intervals resample tasks, all places and controls of a label together, so that pathways are compared on the same draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.rollouts.experiments.kinds.probes_scores import GOAL, Scored

with needs_analysis_extra():
    import pandas as pd

VLM, EXPERT = "language model", "expert"
# what is between the language model and the expert belongs to the former's side of the claims
PATHWAYS = {VLM: ("vlm", "adapter"), EXPERT: ("expert",)}
ALONE = "language model without the adapter"
BOTH = "block and pad"
AHEAD = {VLM: f"{VLM} less {EXPERT}", EXPERT: f"{EXPERT} less {VLM}"}
_DRAWS = 2000


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A label's margin on one side. chosen: on each half of the tasks, for the other; estimate, and draws of it;
    largest: the margin of the best place on all tasks, which was chosen by what it is judged by."""

    chosen: tuple[Scored, ...]
    estimate: float
    draws: Float64[np.ndarray, " draw"]
    largest: float


def hold_out(scored: Sequence[Scored], seed: int) -> pd.DataFrame:
    """One row for every label and side of the comparison, and for what one side is ahead of the other by.

    score, margin: of the chosen places on the half of the tasks that they were not chosen on, mean of the halves, the
    margin with its 95 % interval by tasks; largest: the largest margin of any place on all tasks; places: how many
    there were to choose from; least_control: the score of the best control, at the place where it is least. Of the
    expert, the first denoise step alone: later its own input is nearly the action.
    "block and pad" is the mean of the two. What one side is ahead by is of margins that are at least 0.
    """
    found: dict[tuple[str, str], HeldOut] = {}
    rows = []
    for label in dict.fromkeys(each.label for each in scored):
        for side, ways in _sides(scored).items():
            mine = [each for each in scored if each.label == label and _counts(each, ways)]
            if not mine:
                continue
            held = found[label, side] = _judge(mine, seed)
            rows.append(_row(label, side, held, mine))
    for label, own in {**{label: (label,) for label in dict.fromkeys(key[0] for key in found)}, BOTH: GOAL}.items():
        for side, other in ((VLM, EXPERT), (EXPERT, VLM)):
            if all((each, way) in found for each in own for way in (side, other)):
                rows.append(_ahead(label, side, other, own, found))
    return pd.DataFrame(rows)


def _sides(scored: Sequence[Scored]) -> dict[str, tuple[str, ...]]:
    """PATHWAYS, and the language model by itself where there is an adapter."""
    adapts = any(hook_names.pathway(each.site) == "adapter" for each in scored)
    return PATHWAYS | ({ALONE: ("vlm",)} if adapts else {})


def _counts(scored: Scored, ways: Sequence[str]) -> bool:
    denoised = hook_names.is_denoised(scored.site)
    return hook_names.pathway(scored.site) in ways and (not denoised or scored.denoise_step == 0)


def _judge(mine: Sequence[Scored], seed: int) -> HeldOut:
    n = mine[0].found.probe.marker.n
    half = np.arange(n) % 2 == 0
    # the same draws for every label and side
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_DRAWS).astype(np.float64)
    chosen, estimates, draws = [], [], []
    for choose, judge in ((half, ~half), (~half, half)):
        best = max(mine, key=lambda each: _known(each.found.margins(choose[None].astype(np.float64))[0]))
        chosen.append(best)
        estimates.append(best.found.margins(judge[None].astype(np.float64))[0])
        draws.append(best.found.margins(times * judge))
    largest = max(each.found.margin for each in mine)
    return HeldOut(tuple(chosen), float(np.mean(estimates)), np.mean(draws, axis=0), largest)


def _known(margin: float) -> float:
    """A place without a margin on some tasks is not chosen by them."""
    return -np.inf if np.isnan(margin) else margin


def _row(label: str, side: str, held: HeldOut, mine: Sequence[Scored]) -> dict[str, Any]:
    places = dict.fromkeys(f"{each.site} ({each.segment})" for each in held.chosen)
    probe = [each.found.probe for each in held.chosen]
    low, high = _ends(held.draws)
    return {
        "label": label, "side": side, "metric": probe[0].metric, "places": len(mine), "chosen": ", ".join(places),
        "score": float(np.mean([each.score for each in probe])), "margin": held.estimate, "low": low, "high": high,
        "best_control": ", ".join(dict.fromkeys(each.row()["best_control"] for each in held.chosen)),
        "largest": held.largest, "least_control": min(each.found.probe.score - each.found.margin for each in mine),
        "n": probe[0].n, "n_groups": probe[0].n_groups,
    }  # fmt: skip


def _ahead(
    label: str, side: str, other: str, own: Sequence[str], found: Mapping[tuple[str, str], HeldOut]
) -> dict[str, Any]:
    pairs = [(found[each, side], found[each, other]) for each in own]
    # a control that reads more than the model says nothing for the other side
    low, high = _ends(np.mean([np.maximum(mine.draws, 0) - np.maximum(theirs.draws, 0) for mine, theirs in pairs], 0))
    margin = float(np.mean([max(mine.estimate, 0) - max(theirs.estimate, 0) for mine, theirs in pairs]))
    return {"label": label, "side": AHEAD[side], "margin": margin, "low": low, "high": high}


def _ends(draws: Float64[np.ndarray, " draw"]) -> tuple[float, float]:
    """The 95 % interval; draws without a score are left out, and NaN stands for none."""
    if not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)
