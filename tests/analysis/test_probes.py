"""Probes on data whose answers are known: planted directions, labels that mean nothing, signals that are elsewhere."""

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold

from hooked_vla.analysis.probes import (
    fit_probe,
    grouped_folds,
    metadata_features,
    score_probe,
    score_with_controls,
    shuffle_labels,
)

N, D = 240, 12
RNG = np.random.default_rng(0)
DIRECTION = RNG.normal(size=D)
DIRECTION /= np.linalg.norm(DIRECTION)
GROUPS = np.repeat(np.arange(12), N // 12).tolist()


def activations(seed: int = 0) -> np.ndarray:
    """Correlated columns of very different scale."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) / 3 + rng.normal(size=(N, D))) + 5


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_ridge_finds_a_planted_direction_in_activation_space() -> None:
    scales = np.logspace(-2, 2, D)
    x = activations() * scales
    # what reads the planted combination off rescaled columns is the direction divided by the scales
    expected = DIRECTION / scales
    y = x @ expected
    probe = fit_probe(x, y + 0.01 * RNG.normal(size=N), "ridge")
    assert cosine(probe.directions[0], expected) > 0.99
    assert np.isclose(np.linalg.norm(probe.directions[0]), 1)
    assert r2_score(y, probe.predict(x)[:, 0]) > 0.99
    assert np.allclose(probe.center, x.mean(0))


def test_logistic_finds_the_direction_between_two_classes_and_predicts_more() -> None:
    x = activations()
    side = (x - x.mean(0)) @ DIRECTION
    two = fit_probe(x, np.where(side > 0, "b", "a"), "logistic", c=100.0)
    assert cosine(two.directions[0], DIRECTION) > 0.95 and two.classes == ("a", "b")
    assert (two.predict(x) == np.where(side > 0, "b", "a")).mean() > 0.95
    terciles = np.digitize(side, np.quantile(side, [1 / 3, 2 / 3]))
    three = fit_probe(x, terciles, "logistic", c=100.0)
    assert three.weights.shape == (3, D) and np.allclose(three.weights.sum(0), 0)
    assert (three.predict(torch.from_numpy(x)) == terciles).mean() > 0.8


def test_scores_are_scikit_learns_on_the_predictions_of_unseen_groups() -> None:
    x = activations()
    y = np.stack([x @ DIRECTION, x[:, 0] + RNG.normal(size=N)], axis=1)
    found = score_probe(x, y, GROUPS, "ridge", n_folds=4)
    assert np.isclose(found.score, r2_score(y, found.predictions))
    assert found.low < found.score < found.high and found.chance == 0
    assert (found.n, found.n_groups, found.n_folds) == (N, 12, 4)
    label = (x @ DIRECTION + RNG.normal(size=N) > np.median(x @ DIRECTION)).astype(int)
    auc = score_probe(x, label, GROUPS, "logistic", "auc")
    assert np.isclose(auc.score, roc_auc_score(label, auc.predictions)) and auc.n_folds == 12
    again = score_probe(x, label, GROUPS, "logistic", "auc")
    assert (auc.low, auc.high) == (again.low, again.high)


def test_no_group_is_on_both_sides_of_a_fold() -> None:
    names = np.array([f"g{i % 7}" for i in range(50)])
    for n_folds in (None, 2, 5):
        folds = grouped_folds(names.tolist(), n_folds)
        assert len(folds) == (7 if n_folds is None else n_folds)
        assert sorted(np.concatenate([test for _, test in folds])) == list(range(50))
        for train, test in folds:
            assert not set(names[train]) & set(names[test])
            assert sorted([*train, *test]) == list(range(50))


def test_no_fold_has_a_class_to_itself_where_another_deal_avoids_that() -> None:
    """Folds of equal size by order alone would test on all groups of a class at once."""
    groups = [f"g{i}" for i in range(12) for _ in range(3)]
    size = GroupKFold(3).split(groups, groups=groups)
    together = next(test for _, test in size)
    classes = np.where(np.isin(np.arange(36), together), "a", np.where(np.arange(36) % 6 < 3, "b", "c"))
    folds = grouped_folds(groups, 3, classes)
    for train, test in folds:
        assert set(classes[test]) <= set(classes[train])
        assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(36))
    x = RNG.normal(size=(36, 4)) + 9 * (classes == "a")[:, None]
    found = score_with_controls(x, classes, groups, "logistic", n_folds=3)
    assert (found.probe.predictions[classes == "a"] == "a").all()


def test_what_only_tells_groups_apart_scores_chance() -> None:
    """Every group has a fingerprint and a label drawn for it: a split by rows would score 1."""
    rng = np.random.default_rng(1)
    prints, drawn = rng.normal(size=(12, D)), np.array([0, 1] * 6)
    number = np.array(GROUPS)
    x, y = prints[number] + 0.05 * rng.normal(size=(N, D)), drawn[number]
    by_row = score_probe(x, y, list(range(N)), "logistic", n_folds=4)
    by_group = score_probe(x, y, GROUPS, "logistic")
    assert by_row.score > 0.99 and by_group.score < 0.7


def test_shuffled_labels_score_chance() -> None:
    x = activations()
    y = (x @ DIRECTION > np.median(x @ DIRECTION)).astype(int)
    found = score_with_controls(x, y, GROUPS, "logistic", n_shuffles=5, n_folds=4)
    assert found.probe.score > 0.9 and abs(found.shuffled - 0.5) < 0.12
    assert np.isclose(found.selectivity, found.probe.score - found.shuffled) and found.selectivity > 0.3
    numbers = score_with_controls(x, x @ DIRECTION, GROUPS, "ridge", n_shuffles=3, n_folds=4)
    assert numbers.probe.score > 0.99 and numbers.shuffled < 0.05


def test_shuffled_labels_stay_learnable_where_classes_are_few() -> None:
    """Of twelve groups with three labels each, many shuffles leave all of a class to one fold."""
    labels = np.repeat(np.array(["a", "b", "c", "d"]), 3)
    x = np.random.default_rng(0).normal(size=(12, 3))
    for seed in range(10):
        found = score_with_controls(x, labels, list(range(12)), "logistic", n_shuffles=4, n_folds=2, seed=seed)
        assert 0 <= found.shuffled <= found.shuffled_high <= 1


def test_shuffling_by_unit_keeps_units_whole() -> None:
    labels = np.repeat(["a", "b", "c", "d"], 5)
    units = np.repeat(np.arange(4), 5).tolist()
    shuffled = shuffle_labels(labels, 3, units)
    assert sorted(shuffled) == sorted(labels) and (shuffled.reshape(4, 5) == shuffled[::5, None]).all()
    assert (shuffled != labels).any()
    assert sorted(shuffle_labels(labels, 3)) == sorted(labels)
    with pytest.raises(ValueError, match="unit 0 has several labels"):
        shuffle_labels(np.arange(20), 0, units)


def test_a_signal_of_metadata_alone_is_caught_by_the_baseline() -> None:
    """Activations hold the time step, and the label follows time: nothing is read that a clock does not say."""
    time = np.tile(np.arange(N // 12), 12)
    x = np.concatenate([activations(), time[:, None]], axis=1)
    y = 0.3 * time**2 + RNG.normal(size=N)
    clock = metadata_features({"env_step": time, "task": [f"t{g}" for g in GROUPS]})
    found = score_with_controls(x, y, GROUPS, "ridge", baselines={"metadata": clock}, n_folds=4)
    assert found.selectivity > 0.5 and found.margin < 0.05
    assert clock.shape == (N, 2 + 12)


def test_r2_within_groups_gives_nothing_for_telling_them_apart() -> None:
    number = np.array(GROUPS)
    y = number + 0.3 * np.random.default_rng(2).normal(size=N)
    x = np.eye(12)[number]
    rows = list(range(N))
    assert score_probe(x, y, rows, "ridge", n_folds=5).score > 0.9
    # a little below 0: the means are those of other rows
    assert -0.2 < score_probe(x, y, rows, "ridge", n_folds=5, within=GROUPS).score <= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.full((6, 2), np.nan)}, "x has NaN or infinite numbers in 6 of 6 rows, first"),
        ({"y": np.zeros(6)}, r"y is constant in outputs \[0\]"),
        ({"y": ["a"] * 6, "kind": "logistic"}, "all labels are 'a': nothing to tell apart"),
        ({"groups": [0] * 6}, r"groups that it has not seen: that needs at least 2, got \[0\]"),
        ({"n_folds": 5}, "5 folds of 3 groups"),
        ({"groups": [0, 1]}, "6 rows, but groups has 2"),
        ({"y": np.arange(5.0)}, "one label a row"),
        ({"metric": "auc"}, "ridge probes are not scored by 'auc'"),
        ({"y": ["a", "a", "b", "b", "c", "c"], "kind": "logistic"}, r"classes \['.'\] are in the groups \[.\] alone"),
        ({"y": list("abcabc"), "kind": "logistic", "metric": "auc"}, "auc is of two classes"),
        ({"y": np.array([1, np.inf, 2, 3, 4, 5])}, "y has NaN or infinite numbers"),
        ({"y": [0.0, 0, 1, 1, 2, 2], "within": [0, 0, 1, 1, 2, 2]}, "do not vary within the groups"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_said(change, message: str) -> None:
    given = {"x": activations()[:6, :2], "y": np.arange(6.0), "groups": [0, 0, 1, 1, 2, 2], "kind": "ridge"} | change
    with pytest.raises(ValueError, match=message):
        score_probe(**given)


def test_metadata_must_be_columns() -> None:
    for columns, message in (
        ({}, "at least one column"),
        ({"a": [1, 2], "b": [1]}, "metadata column 'b' has shape"),
        ({"a": [1.0, np.nan]}, "'a' has numbers that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            metadata_features(columns)
