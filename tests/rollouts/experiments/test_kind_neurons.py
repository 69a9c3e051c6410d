"""E12: shifts are counted in the word's direction, damage is not steering, and a tiny run leaves what it promises."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from report_numbers import unknown_numbers

from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds.neurons import Settings, _verdicts, best_doses
from hooked_vla.rollouts.experiments.kinds.neurons_shifts import (
    CONTRAST,
    HEIGHT,
    NEURONS,
    PROMPT,
    RANDOM,
    SAID,
    SPEED,
    UNSAID,
    measures,
    references,
    shift_table,
)
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options

MODEL = "smolvla-tabletop"


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return Context(find_experiment("E12"), ModelSource(MODEL), tmp_path_factory.mktemp("neurons"))


def _shifts(said: float, unsaid: float, broken: tuple[float, ...] = (), random: float = 0.0) -> pd.DataFrame:
    """Two words; their prompts shift by 0.1. Neurons shift by dose times the given number; they break the policy at
    the doses named."""
    rows = []
    for word in ("high", "low"):
        for prompt, strength in ((SAID, said), (UNSAID, unsaid)):
            for seed in range(8):
                about = {"word": word, "prompt": prompt, "task": "x", "seed": seed, "held_out": seed % 2 == 1,
                         "measure": HEIGHT, "steps": 30, "value": 0.1, "baseline": 0.1}  # fmt: skip
                rows.append(about | {"arm": "baseline", "arm_kind": "baseline", "dose": np.nan, "shift": 0.0,
                                     "success": True})  # fmt: skip
                rows.append(about | {"arm": PROMPT, "arm_kind": PROMPT, "dose": np.nan, "shift": 0.1, "success": True})
                for dose in (1.0, 2.0):
                    for kind, size in ((NEURONS, strength), (CONTRAST, 0.0), (RANDOM, random)):
                        rows.append(
                            about | {"arm": f"{kind} {dose}", "arm_kind": kind, "dose": dose,
                                     "shift": 0.1 * dose * size, "success": not (kind == NEURONS and dose in broken)}
                        )  # fmt: skip
    return pd.DataFrame(rows)


def _judged(context: Context, shifts: pd.DataFrame) -> dict[str, bool | None]:
    return {each.rule: each.holds for each in _verdicts(context, shifts, best_doses(shifts, 0.5), 0.5)}


def test_a_shift_with_style_words_and_none_without_holds(context):
    assert _judged(context, _shifts(said=0.3, unsaid=0.01)) == {"said-shift": True, "unsaid-weak": True}
    assert _judged(context, _shifts(said=0.01, unsaid=0.3)) == {"said-shift": False, "unsaid-weak": None}
    assert _judged(context, _shifts(said=0.3, unsaid=0.3)) == {"said-shift": True, "unsaid-weak": False}


def test_what_random_neurons_do_too_is_no_steering(context):
    assert _judged(context, _shifts(said=0.3, unsaid=0.0, random=0.4))["said-shift"] is False


def test_damage_is_not_steering(context):
    shifts = _shifts(said=0.2, unsaid=0.2, broken=(2.0,))
    assert {dose for key, dose in best_doses(shifts, 0.5).items() if key[2] == NEURONS} == {1.0}
    # 20 % at the dose that leaves the policy working; 40 % at the one that does not count
    # nothing steers where it should: that it does not where it should not says nothing
    assert _judged(context, shifts) == {"said-shift": False, "unsaid-weak": None}
    everywhere = _shifts(said=2.0, unsaid=2.0, broken=(1.0, 2.0))
    assert _judged(context, everywhere) == {"said-shift": False, "unsaid-weak": None}


def test_damage_in_held_out_episodes_is_not_steering_either(context):
    """The dose was chosen on episodes in which the policy still works; in those that are judged it does not."""
    shifts = _shifts(said=0.3, unsaid=0.0)
    lost = shifts["held_out"] & (shifts["arm_kind"] == NEURONS) & (shifts["word"] == "low")
    found = _verdicts(context, shifts.assign(success=shifts["success"] & ~lost), best_doses(shifts, 0.5), 0.5)[0]
    # the one word's 60 % count half
    assert found.measured.startswith("+30% (") and "under low × 2 it succeeds in 0% of the held-out" in found.measured
    lost = shifts["held_out"] & (shifts["arm_kind"] == NEURONS)
    found = _verdicts(context, shifts.assign(success=shifts["success"] & ~lost), best_doses(shifts, 0.5), 0.5)[0]
    assert found.holds is False and "there is nothing to steer" in found.measured


def test_an_interval_with_the_limit_in_it_is_undecided(context):
    shifts = _shifts(said=0.15, unsaid=0.0)
    spread = shifts["arm_kind"].eq(NEURONS) & shifts["prompt"].eq(SAID)
    shifts["shift"] += (shifts["seed"] % 8 - 3.5).where(spread, 0.0) * 0.01
    found = _verdicts(context, shifts, best_doses(shifts, 0.5), 0.5)
    assert [each.holds for each in found] == [None, None] and "undecided" in found[0].measured


def test_without_a_reference_or_a_working_baseline_nothing_is_judged(context):
    shifts = _shifts(said=0.3, unsaid=0.0)
    still = shifts.assign(shift=shifts["shift"].where(shifts["arm_kind"] != PROMPT, 0.0))
    failing = shifts.assign(success=shifts["success"] & (shifts["arm_kind"] != "baseline"))
    for each in (still, failing):
        assert _judged(context, each) == {"said-shift": None, "unsaid-weak": None}


def test_shares_are_of_what_the_word_in_the_prompt_does():
    shifts = _shifts(said=0.3, unsaid=0.1)
    assert references(shifts) == {"high": pytest.approx(0.1), "low": pytest.approx(0.1)}
    table = shift_table(shifts, seed=0)
    row = table[(table["arm_kind"] == NEURONS) & (table["dose"] == 2.0) & (table["prompt"] == SAID)].iloc[0]
    assert row["share_of_prompt"] == pytest.approx(0.6) and row["n"] == 8


def test_height_and_speed_of_a_path():
    states = np.array([[0, 0, 0.1, 0], [0.03, 0, 0.1, 0], [0.03, 0.04, 0.1, 1]])
    found = measures(states)
    assert found[HEIGHT] == pytest.approx(0.1) and found[SPEED] == pytest.approx(0.035)


def test_neurons_and_random_ones_are_compared_in_the_same_episodes(context):
    """Both move episodes by very different amounts, the neurons a little more in every one of them."""
    shifts = _shifts(said=0.3, unsaid=0.0, random=0.25)
    spread = shifts["seed"] % 4 * 0.02
    moved = shifts["arm_kind"].isin([NEURONS, RANDOM]) & (shifts["prompt"] == SAID)
    shifts["shift"] += spread.where(moved, 0.0)
    assert _judged(context, shifts)["said-shift"] is True


def test_unknown_words_and_models_without_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no style of the tabletop is said by \['sideways'\]"):
        Settings(1, ("sideways",), 1, 1, (1.0,), 1, 0.5)
    with pytest.raises(ValueError, match="reads no words"):
        run_experiment("E12", tmp_path / "act", "act-tabletop", quick=True)
    few = replace(find_experiment("E12"), quick={"n_neurons": 500})
    with pytest.raises(ValueError, match="fewer than the 500 that are asked for"):
        run_experiment(few, tmp_path / "few", MODEL, quick=True)


def test_a_tiny_run_leaves_tables_doses_and_verdicts(tmp_path):
    quick = {"episodes": 2, "words": ["high"], "n_neurons": 2, "doses": [1.0], "n_random": 1}
    definition, options = replace(find_experiment("E12"), quick=quick), Options(max_steps=4)
    outcome = run_experiment(definition, tmp_path, MODEL, quick=True, options=options)
    # four steps are too few to succeed in
    assert {each.rule: each.holds for each in outcome.verdicts} == {"said-shift": None, "unsaid-weak": None}
    assert "floor effect" in outcome.verdicts[0].measured
    kinds = outcome.main.groupby("prompt")["arm_kind"].agg(set).to_dict()
    every = {"baseline", "rerun", PROMPT, NEURONS, CONTRAST, RANDOM}
    assert kinds == {SAID: every, UNSAID: every}
    neurons = outcome.tables["neurons"]
    assert len(neurons) == 2 and (neurons["word"].str.strip() == "high").all()
    rerun = outcome.main[outcome.main["arm_kind"] == "rerun"]
    assert (rerun["shift"].abs() < 1e-4).all()
    assert set(outcome.figures) == {"doses"} and (tmp_path / "figures" / "doses.png").is_file()
    assert "input embeddings" in (tmp_path / "report.md").read_text()
    assert unknown_numbers(tmp_path, definition) == []
