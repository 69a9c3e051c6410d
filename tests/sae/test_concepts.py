"""Concepts: the formulas by hand, planted features found on held-out seeds, and what goes with the task told apart."""

import json

import numpy as np
import pytest
import torch

from hooked_vla.sae.concepts import Concept, contrast, directions, find_concepts, held_out_steps
from hooked_vla.sae.feature_steps import FeatureSteps

N_EPISODES, LENGTH = 40, 12
EPISODE = np.repeat(np.arange(N_EPISODES), LENGTH)
TASKS = [("red", "green", "blue")[e % 3] for e in EPISODE]
TARGET = [("a", "b", "b")[e % 3] for e in EPISODE]
SEEDS = EPISODE // 3
# the phase begins at another step in each episode
PHASE = ["grasp" if 3 + e % 4 <= t < 7 + e % 4 else "reach" for e in range(N_EPISODES) for t in range(LENGTH)]
GRASP = np.array(PHASE) == "grasp"


@pytest.fixture(scope="module")
def steps() -> FeatureSteps:
    """0: of the phase; 1: of the task "red"; 2: of both by chance; 3: of the phase in one task only; 4: never; then
    noise."""
    rng = np.random.default_rng(0)
    values = np.maximum(rng.standard_normal((len(EPISODE), 30)) - 1, 0)
    red = np.array(TASKS) == "red"
    values[:, 0] = GRASP * (2 + 0.3 * rng.standard_normal(len(EPISODE)))
    values[:, 1] = red * (2 + 0.3 * rng.standard_normal(len(EPISODE)))
    values[:, 3] = (GRASP & red) * 2.0 + 0.2 * np.maximum(rng.standard_normal(len(EPISODE)), 0)
    values[:, 4] = 0
    return FeatureSteps.from_dense(torch.from_numpy(np.maximum(values, 0)).float(), EPISODE)


def dense(steps: FeatureSteps) -> np.ndarray:
    values = np.zeros((steps.n_steps, steps.n_features))
    values[steps.row, steps.feature] = steps.value
    return values


def test_a_contrast_is_its_formula(steps):
    x, rng = dense(steps), np.random.default_rng(1)
    positive = GRASP & (rng.random(len(GRASP)) < 0.9)
    negative = ~GRASP & (rng.random(len(GRASP)) < 0.5)
    found = contrast(steps, positive, negative, TASKS)
    a, b = x[positive], x[negative]
    spread = np.sqrt(((len(a) - 1) * a.var(0, ddof=1) + (len(b) - 1) * b.var(0, ddof=1)) / (len(a) + len(b) - 2))
    alive = spread > 0
    np.testing.assert_allclose(found.d[alive], ((a.mean(0) - b.mean(0)) / np.where(alive, spread, 1))[alive], rtol=1e-9)
    np.testing.assert_allclose(found.frequency, (a > 0).mean(0))
    np.testing.assert_allclose(found.score, found.d * found.frequency)
    assert found.d[4] == 0 and found.n_tasks == 3
    # within tasks, as the slope of a regression on the label and the tasks
    used, task = positive | negative, np.array(TASKS)
    design = np.column_stack([positive[used], *(task[used] == name for name in ("red", "green", "blue"))]).astype(float)
    slope = np.linalg.lstsq(design, x[used], rcond=None)[0][0]
    cells = [x[kind & (task == name)] for kind in (positive, negative) for name in ("red", "green", "blue")]
    inside = np.sqrt(sum(((each - each.mean(0)) ** 2).sum(0) for each in cells) / (used.sum() - 6))
    np.testing.assert_allclose(found.within[alive], (slope / np.where(inside > 0, inside, 1))[alive], rtol=1e-8)


def test_planted_features_are_found_and_tasks_told_apart(steps):
    labels = {"phase": PHASE, "target": TARGET, "none": [None] * len(PHASE)}
    found = {str(each): each for each in find_concepts(steps, labels, TASKS, SEEDS, top=5)}
    assert list(found) == ["phase=reach", "phase=grasp", "target=a", "target=b"]
    grasp = found["phase=grasp"]
    best = grasp.features[0]
    assert best.feature == 0 and best.is_confirmed and best.p_value == pytest.approx(1 / 21)
    assert not grasp.is_confounded and grasp.n_tasks == 3 and best.held_out.frequency > 0.95
    # a target that goes with the task: nothing is confirmed, however large d is
    target = found["target=a"]
    assert target.is_confounded and target.features[0].feature == 1 and target.features[0].held_out.d > 3
    assert np.isnan(target.features[0].held_out.within) and not target.features[0].is_confirmed
    noise = [each for each in grasp.features if each.feature > 4]
    assert noise and not any(each.is_confirmed for each in noise) and min(each.p_value for each in noise) > 0.3
    text = json.dumps({name: each.to_json() for name, each in found.items()}, allow_nan=False)
    assert json.loads(text)["target=a"]["features"][0]["held_out"]["within"] is None


def test_a_label_that_only_looks_like_the_task_is_not_confirmed(steps):
    """A label that the task makes likely: its feature differs over all steps, but not within tasks."""
    rng = np.random.default_rng(3)
    likely = np.where(np.array(TASKS) == "red", 0.7, 0.15)
    label = ["yes" if u < p else "no" for u, p in zip(rng.random(len(TASKS)), likely, strict=True)]
    (yes,) = [each for each in find_concepts(steps, {"l": label}, TASKS, SEEDS) if each.value == "yes"]
    best = yes.features[0]
    assert best.feature == 1 and best.held_out.d > 0.8 and abs(best.held_out.within) < 0.5
    assert not yes.is_confounded and not best.is_confirmed


def test_held_out_seeds_are_whole_and_what_was_chosen_does_not_see_them(steps):
    away = held_out_steps(SEEDS, 0.3, 0)
    assert len(set(SEEDS[away])) == 4 and not set(SEEDS[away]) & set(SEEDS[~away])
    # other numbers in held-out steps change no choice
    x = dense(steps)
    x[away] = x[away][:, ::-1]
    other = FeatureSteps.from_dense(torch.from_numpy(x.copy()).float(), EPISODE)
    first, second = (find_concepts(each, {"phase": PHASE}, TASKS, SEEDS)[1] for each in (steps, other))
    assert [each.chosen for each in first.features] == [each.chosen for each in second.features]
    assert [each.p_value for each in first.features] == [each.p_value for each in second.features]
    assert second.features[0].feature == 0 and not second.features[0].is_confirmed
    assert isinstance(first, Concept)


def test_values_that_are_rare_are_left_out(steps):
    rare = ["once" if i == 5 else "often" for i in range(len(PHASE))]
    assert find_concepts(steps, {"rare": rare}, TASKS, SEEDS) == []


def test_directions_are_words():
    motion = np.array([[0.3, 0.1, 0], [0, -0.5, 0.1], [0.01, 0, 0.02], [0, 0, 0.4]])
    assert directions(motion, 0.05) == ["+x", "-y", "still", "+z"]
    with pytest.raises(ValueError, match=r"motion must be \[n 3\], got \[4, 2\]"):
        directions(motion[:, :2], 0.05)


def test_mistakes_are_named(steps):
    with pytest.raises(ValueError, match="no labels"):
        find_concepts(steps, {}, TASKS, SEEDS)
    with pytest.raises(ValueError, match="phase: 3 for 480 steps"):
        find_concepts(steps, {"phase": PHASE[:3]}, TASKS, SEEDS)
    with pytest.raises(ValueError, match=r"two are needed, got \[7\]"):
        find_concepts(steps, {"phase": PHASE}, TASKS, np.full(len(PHASE), 7))
    with pytest.raises(ValueError, match="held_out must be"):
        find_concepts(steps, {"phase": PHASE}, TASKS, SEEDS, held_out=1.0)
    with pytest.raises(ValueError, match="both with and without"):
        contrast(steps, GRASP, GRASP, TASKS)
    with pytest.raises(ValueError, match="two steps of each kind"):
        contrast(steps, GRASP, np.zeros_like(GRASP), TASKS)
