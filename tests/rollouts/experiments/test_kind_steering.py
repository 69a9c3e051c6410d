"""E11: the sham is exact, features are chosen by where the end effector goes, and verdicts follow from the tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from report_numbers import unknown_numbers
from sae_case import context, run

from hooked_vla.rollouts.experiments.compare import Runs, layout_of
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import steering as kind
from hooked_vla.rollouts.experiments.kinds import steering_features as features
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.store import TokenStore

EXPERT = "expert.blocks.1.hook_resid_post"
RHOS = [-1.5, -0.25, 0.25, 1.5]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(
        "E11", tmp_path_factory.mktemp("e11") / "run", sites=[EXPERT], rhos=RHOS[1:], n_random=1, scenes=1,
        phases=["approach"], phase_rho=0.25, train_steps=10, densities=[0.0, 1.0],
    )  # fmt: skip


def test_doses_move_and_the_sham_does_not(done) -> None:
    table = done[1].main
    own = table[table["site"] == EXPERT]
    assert own["arm"].tolist() == [f"{EXPERT}: {name}" for name in (
        "sham", "feature -0.25", "feature +0.25", "feature +1.5", "feature out",
        "random 0 -0.25", "random 0 +0.25", "random 0 +1.5", "random 0 out",
    )]  # fmt: skip
    [sham] = own[own["direction"] == "sham"].to_dict("records")
    assert sham["unchanged"] == 2 and sham["shift"] == 0 == sham["displacement"] and sham["rho"] == 0
    others = own[own["direction"] != "sham"]
    assert (others["unchanged"] == 0).all() and (others["displacement"] > 0).all() and (others["endpoint"] > 0).all()
    axis = own["axis"].iloc[0]
    assert np.allclose(own["shift"], own[f"shift_{axis}"])
    # the first plan of an episode is not edited in phases, and two plans fit into eight steps
    assert done[1].tables["phases"]["rho"].tolist() == [-0.25, 0.25]
    assert unknown_numbers(done[0].out, find_experiment("E11")) == []
    assert {each.rule: each.holds for each in done[1].verdicts}["sham"] is True


def test_slopes_are_those_of_the_shifts(done) -> None:
    table, slopes = done[1].main.set_index("arm"), done[1].tables["slopes"].set_index("direction")
    up, down = (table.loc[f"{EXPERT}: feature {rho:+g}", "shift"] for rho in (0.25, -0.25))
    assert slopes.loc["feature", "slope"] == pytest.approx((up - down) / 0.5)
    assert slopes.loc["beyond-random", "slope"] == pytest.approx(
        abs(slopes.loc["feature", "slope"]) - abs(slopes.loc["random 0", "slope"])
    )


def test_what_is_left_of_instructions_falls_with_the_dose(done) -> None:
    told = done[1].tables["instructions"].set_index("arm")["apart"]
    assert told[f"{EXPERT}: sham"] == pytest.approx(1.0) and (told >= 0).all()
    assert told[f"{EXPERT}: feature +0.25"] != told[f"{EXPERT}: feature +1.5"]


def test_motions_are_those_between_plans(done) -> None:
    store = TokenStore(done[0].folder("activations") / "saes")
    found = features.motions(store, layout_of("goal"))
    steps = read_steps(store.folder / "rollouts", [1]).to_pandas()
    ends = read_episodes(store.folder / "rollouts").to_pandas().set_index("episode")["final_state"]
    starts = np.flatnonzero(np.diff(steps["chunk"], prepend=-1)).tolist()
    assert [step for episode, step in found if episode == 1] == starts
    states = [*steps["state"], ends[1]]
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        assert np.allclose(found[1, start][1], np.asarray(states[end])[:3] - np.asarray(states[start])[:3])
    # every plan's tokens are counted
    sae = SparseAutoencoder.from_pretrained(done[0].folder("saes") / EXPERT)
    plans, mean, density = features.activity(store, sae)
    assert sorted(plans) == sorted(found)
    f = sae.encode(store.read(EXPERT, store.find(EXPERT, {"episode": [1], "env_step": [0]})))
    assert np.allclose(mean[plans.index((1, 0))], f.mean(0).detach().numpy(), atol=1e-5)
    every = sae.encode(store.read(EXPERT, torch.arange(store.n_rows(EXPERT))))
    assert np.allclose(density, (every != 0).float().mean(0).numpy(), atol=1e-6)


def test_a_planted_feature_is_chosen_and_turned_up_the_axis(done, monkeypatch) -> None:
    store = TokenStore(done[0].folder("activations") / "saes")
    sae = SparseAutoencoder.from_pretrained(done[0].folder("saes") / EXPERT)
    moved = features.motions(store, layout_of("goal"))
    plans = list(moved)
    planted = np.random.default_rng(0).normal(size=(len(plans), 6))
    planted[:, 4] = [-2 * moved[plan][1][2] for plan in plans]
    # rare, and perfect otherwise: not to be chosen
    planted[:, 5] = planted[:, 4]
    density = np.array([0.2] * 5 + [0.001])
    monkeypatch.setattr(features, "activity", lambda *_: (plans, planted, density))
    best = features.rank_features(store, sae, layout_of("goal"), (0.01, 0.5), 3).to_dict("records")[0]
    assert best["feature"] == 4 and best["axis"] == "z" and best["correlation"] == pytest.approx(-1.0)
    row = sae.splice().w_dec[4]
    assert torch.equal(features.chosen(best).direction(sae), -row)
    with pytest.raises(ValueError, match="no feature is active in 0.9 to 1 of the tokens"):
        features.rank_features(store, sae, layout_of("goal"), (0.9, 1.0), 3)


def judged(tmp_path, shift, apart: float = 0.1, success: bool = True):
    """Verdicts where `shift(direction, rho, scene)` metres is how far the end effector goes along z."""
    made = context("E11", tmp_path, rhos=RHOS, n_random=1, phases=[])
    settings = made.definition.settle(False)
    part = kind.Steering(features.Choice(EXPERT, 3, 2, 0.5, 0.1), [])
    arms = {
        part.name(f"{direction} {rho:+g}"): (direction, rho) for direction in ("feature", "random 0") for rho in RHOS
    }
    arms |= {part.name("sham"): ("sham", 0.0), "baseline": ("sham", 0.0)}
    rows, states = [], []
    for arm, (direction, rho) in arms.items():
        for i in range(12):
            rows.append({"suite": "goal", "arm": arm, "task": f"t{i % 4}", "seed": i, "success": success})
            place = 0.0 if direction == "sham" else shift(direction, rho, i)
            states.append(np.full((5, 4), [0, 0, place, 0], np.float32))
    runs = Runs(pd.DataFrame(rows), states, states, states)
    slopes = pd.DataFrame(kind._slopes(made, settings, runs, part))
    told = pd.DataFrame([{"arm": arm, "apart": apart, "low": apart - 0.05, "high": apart + 0.05} for arm in arms]
                        # no dose, and no overwrite
                        + [{"arm": part.name("feature out"), "apart": 1.0, "low": 0.9, "high": 1.1}])  # fmt: skip
    main = pd.DataFrame([
        {"suite": "goal", "arm": arm, "site": EXPERT, "direction": direction, "unchanged": 12, "n": 12,
         "success": float(success)} for arm, (direction, _) in arms.items() if arm != "baseline"
    ] + [{"suite": "goal", "arm": "baseline", "success": float(success), "direction": "baseline"}])  # fmt: skip
    return {each.rule: each for each in kind._verdicts(made, settings, main, slopes, told, [part])}


def test_verdicts_follow_from_slopes_and_what_is_left(tmp_path) -> None:
    def steers(direction: str, rho: float, scene: int) -> float:
        return (0.04 + 0.001 * scene) * rho if direction == "feature" else 0.002 * rho * (-1) ** scene

    found = judged(tmp_path, steers)
    assert {rule: each.holds for rule, each in found.items()} == {
        "sham": True, "overwrite": True, "monotone": True, "beyond-random": True,
    }  # fmt: skip
    # the other way is monotone too; both ways down is not
    assert judged(tmp_path, lambda *each: -steers(*each))["monotone"].holds is True
    assert judged(tmp_path, lambda *each: -abs(steers(*each)))["monotone"].holds is False
    # what any direction does is not the feature's
    same = judged(tmp_path, lambda direction, rho, scene: steers("feature", rho, scene))
    assert same["monotone"].holds is True and same["beyond-random"].holds is False
    assert judged(tmp_path, steers, apart=0.7)["overwrite"].holds is False
    weak = judged(tmp_path, steers, success=False)
    assert weak["monotone"].holds is None and "floor effect" in weak["monotone"].measured


def test_doses_that_the_rules_need_are_asked_for(tmp_path) -> None:
    for rhos, why in (([0.25, 1.5], "both sides of 0"), ([-0.25, 0.25], "a dose beyond 1")):
        with pytest.raises(ValueError, match=why):
            context("E11", tmp_path, rhos=rhos, phases=[])
    settings = context("E11", tmp_path, rhos=RHOS, phases=[]).definition.settle(False)
    with pytest.raises(ValueError, match="phase_rho must be among rhos"):
        replace(settings, phases=("lift",), phase_rho=0.3)
