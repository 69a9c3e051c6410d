"""E10: equal frames whatever the number of tasks, the metric's null beside it, and verdicts follow from the table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from injection_case import run_context
from report_numbers import unknown_numbers

from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import generality as kind
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.records import read_episodes
from hooked_vla.rollouts.settings import Options
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.feature_steps import FeatureSteps
from hooked_vla.sae.generality import PUBLISHED, generality
from hooked_vla.sae.store import TokenStore

SITE = "expert.blocks.1.hook_resid_post"
TINY = {"sites": [SITE], "tasks": [1, 2], "draws": 2, "episodes": 2, "frames": 5, "held_out_episodes": 1, "steps": 4,
        "batch_size": 8, "n_shuffles": 2}  # fmt: skip


def context(out: Path, **settings: Any) -> Context:
    """A run with other settings than its file's, its episodes cut short."""
    definition = find_experiment("E10")
    definition = replace(definition, settings={**definition.settings, **TINY, **settings}, quick={})
    options = Options(n_envs=6, image_size=96, max_steps=4)
    return Context(definition, ModelSource("smolvla-tabletop"), out, options=options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_context(context(tmp_path_factory.mktemp("e10") / "run"))


def test_all_autoencoders_have_equal_frames_and_are_judged_twice(done) -> None:
    each = done[1].tables["autoencoders"]
    assert len(each) == 2 * 2 * 2 and set(each["judged_on"]) == {kind.OWN, kind.SAME}
    own, same = (each[each["judged_on"] == name] for name in (kind.OWN, kind.SAME))
    # two episodes of four frames (they have no fifth), of one task or of two; and all twelve tasks
    assert (own["frames"] == 8).all() and (own["episodes"] == 2).all()
    assert (same["frames"] == 48).all() and (same["episodes"] == 12).all()
    assert each["memorised"].between(0, 1).all() and each["memorised_null"].between(0, 1).all()
    assert set(done[1].figures) == {"memorised", "frequency"}
    assert {each.rule for each in done[1].verdicts} == set(kind.RULES)
    assert unknown_numbers(done[0].out, find_experiment("E10")) == []


def test_shares_are_the_metrics_own(done) -> None:
    """One cell, counted again from the autoencoder and the rows it was judged on."""
    made, outcome = done
    store = TokenStore(made.folder("held_out"))
    x = store.read(SITE, torch.arange(store.n_rows(SITE))).float()
    episode = store.ids(SITE)[:, 0].numpy()
    order = np.lexsort((store.ids(SITE)[:, 1].numpy(), episode))
    sae = SparseAutoencoder.from_pretrained(made.folder("autoencoders") / "draw-1-tasks-2" / SITE)
    steps = FeatureSteps.from_code(sae.encode_sparse(x[order]), sae.config.n_features, episode[order])
    report = generality(steps, PUBLISHED["libero"], n_shuffles=2, seed=1)
    each = outcome.tables["autoencoders"]
    row = each[(each["judged_on"] == kind.SAME) & (each["tasks"] == 2) & (each["draw"] == 1)].iloc[0]
    assert row["memorised"] == pytest.approx(1 - report.general)
    assert row["alive"] == report.statistics.alive.sum()


def test_held_out_episodes_are_of_other_seeds(done) -> None:
    made = done[0]
    trained = {seed for folder in made.folder("x").parent.glob("episodes-*/rollouts")
               for seed in read_episodes(folder)["seed"].to_pylist()}  # fmt: skip
    held_out = set(read_episodes(made.folder("held_out") / "rollouts")["seed"].to_pylist())
    assert len(held_out) == 12 and trained and not trained & held_out


def test_as_many_episodes_of_a_task_are_collected_as_a_draw_needs(tmp_path) -> None:
    settings = context(tmp_path, tasks=[1, 2, 4], episodes=8).definition.settle(False)
    found = kind.needed(settings, [["a", "b", "c", "d"], ["b", "d", "e", "f"]])
    assert found == {8: ["a", "b"], 4: ["d"], 2: ["c", "e", "f"]}


def test_frames_are_spread_over_the_whole_episode(done) -> None:
    frames = kind.Frames([TokenStore(done[0].folder("held_out"))])
    task = next(iter(frames.episodes))
    [part] = frames.of(frames.episodes[task], 2)
    steps = part.store.ids(SITE)[torch.from_numpy(part.rows), 1].tolist()
    # of the plans at steps 0 to 3
    assert steps == [0, 3]
    with pytest.raises(ValueError, match="has 4 frames, fewer than the 5"):
        frames.of(frames.episodes[task], 5)


def judged(made: Context, own: list[float], same: list[float], null: list[float]) -> dict[str, bool | None]:
    """Verdicts on the shares of one task and of two, the same in three draws but for a little."""
    rows = [
        {"site": SITE, "judged_on": where, "tasks": n, "draw": draw, "memorised": shares[i] + 0.01 * draw * i,
         "memorised_null": null[i]}
        for where, shares in ((kind.OWN, own), (kind.SAME, same)) for i, n in enumerate((1, 2)) for draw in range(3)
    ]  # fmt: skip
    found = kind._verdicts(made, made.definition.settle(False), pd.DataFrame(rows))
    return {each.rule: each.holds for each in found}


def test_rules_are_judged_by_the_table(tmp_path) -> None:
    made = context(tmp_path)
    assert judged(made, [0.9, 0.6], [0.9, 0.5], [0.9, 0.9]) == dict.fromkeys(kind.RULES, True)
    # a fall that shuffled steps show too is one of frequency
    found = judged(made, [0.9, 0.6], [0.5, 0.9], [0.9, 0.5])
    assert found == {"falls": True, "same-episodes": False, "beyond-frequency": False}
    # nearly all memorised, whatever was seen
    assert judged(made, [1.0, 1.0], [1.0, 1.0], [0.2, 0.5]) == dict.fromkeys(kind.RULES, None)
    # what does not fall needs no explanation
    found = judged(made, [0.9, 0.895], [0.5, 0.5], [0.5, 0.9])
    assert found == {"falls": None, "same-episodes": False, "beyond-frequency": None}


def test_wrong_settings_are_refused(tmp_path) -> None:
    for wrong, message in (
        ({"tasks": [3]}, "two different numbers of tasks"),
        ({"episodes": 9}, r"9 episodes cannot be spread evenly over \[2\] tasks"),
        ({"coefficients": "mine"}, "unknown coefficients 'mine'"),
        ({"draws": 0}, r"\['draws'\] must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            context(tmp_path, **wrong)
    made = context(tmp_path, tasks=[1, 13], episodes=13)
    with pytest.raises(ValueError, match="goal has 12 tasks, asked for 13"):
        kind.run(made, made.definition.settle(False))
