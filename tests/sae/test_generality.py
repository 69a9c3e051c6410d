"""DrVLA's metric: its statistics by a loop over steps, the fit against another's, and what the null keeps."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from hooked_vla.sae.activations import Code
from hooked_vla.sae.feature_steps import FeatureSteps
from hooked_vla.sae.generality import PUBLISHED, STATISTICS, Generality, episode_statistics, fit, generality

# steps of four episodes, the third of one step
EPISODE = np.repeat([7, 3, 5, 9], [6, 9, 1, 4])


def random_features(seed: int, m: int = 12) -> torch.Tensor:
    """Features that come in bursts, one of them never."""
    rng = np.random.default_rng(seed)
    values = rng.random((len(EPISODE), m)).astype(np.float32) * (rng.random((len(EPISODE), m)) < rng.random(m))
    values[:, 4] = 0
    return torch.from_numpy(np.where(values < 0.05, 0, values * 0.4).astype(np.float32))


def by_loop(features: torch.Tensor, on: float) -> dict[str, list[float]]:
    """The definition, one step after the other."""
    found = {name: [] for name in STATISTICS}
    for column in features.T.tolist():
        episodes = [[v for v, e in zip(column, EPISODE, strict=True) if e == number] for number in (7, 3, 5, 9)]
        onsets, lengths, highest = [], [], []
        for values in episodes:
            state, n_onsets, n_on = False, 0, 0
            for value in values:
                before = state
                state = True if value > on else (False if value == 0 else state)
                n_onsets, n_on = n_onsets + (state and not before), n_on + state
            if max(values) > 0:
                onsets.append(n_onsets)
                highest.append(max(values))
            if n_onsets:
                lengths.append(n_on / n_onsets / len(values))
        found["coverage"].append(len(onsets) / 4)
        for name, each in (("onsets", onsets), ("magnitude", highest), ("run_length", lengths)):
            found[name].append(float(np.mean(each)) if each else 0.0)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_those_of_a_loop_over_steps(seed):
    features = random_features(seed)
    found = episode_statistics(FeatureSteps.from_dense(features, EPISODE))
    for name, expected in by_loop(features, 0.1).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6, err_msg=name)
    assert not found.alive[4] and found.n_episodes == 4
    np.testing.assert_allclose(found.frequency, (features > 0).float().mean(0), rtol=1e-6)


def test_a_feature_is_on_from_above_the_threshold_until_it_is_zero():
    column = [0, 0.05, 0.2, 0.05, 0, 0.3] + [0.05, 0.05, 0, 0, 0, 0, 0, 0, 0] + [0.0] + [0.5, 0.01, 0.01, 0.01]
    found = episode_statistics(FeatureSteps.from_dense(torch.tensor(column)[:, None], EPISODE))
    assert found.coverage[0] == 0.75 and found.active[0] == 3
    # two onsets, none, and one
    assert found.onsets[0] == pytest.approx(1.0)
    assert found.magnitude[0] == pytest.approx((0.3 + 0.05 + 0.5) / 3)
    assert found.run_length[0] == pytest.approx((3 / 2 / 6 + 1) / 2)


def test_codes_and_dense_features_are_the_same_steps():
    features = random_features(1)
    values, indices = features.topk(12, dim=1)
    dense, code = (
        FeatureSteps.from_dense(features, EPISODE), FeatureSteps.from_code(Code(values, indices.int()), 12, EPISODE)
    )  # fmt: skip
    for name in ("row", "feature", "value", "episode"):
        np.testing.assert_array_equal(getattr(dense, name), getattr(code, name))
    # several tokens of a step: the largest counts, and what is below zero does not
    merged = FeatureSteps.of([1, 1, 0], [2, 2, 3], [0.1, 0.7, -1.0], [0, 0], 4)
    assert merged.row.tolist() == [1] and merged.value.tolist() == [pytest.approx(0.7)]
    half = dense.chosen(EPISODE != 3)
    again = FeatureSteps.from_dense(features[torch.from_numpy(EPISODE != 3)], EPISODE[EPISODE != 3])
    np.testing.assert_array_equal(half.value, again.value)
    np.testing.assert_array_equal(half.row, again.row)


def test_published_models_give_the_published_formula():
    features = random_features(2)
    found = episode_statistics(FeatureSteps.from_dense(features, EPISODE))
    c, o, a, r = found.matrix[0]
    libero = 1 / (1 + np.exp(-(1.8009 * c + 1.8858 * o + 0.5164 * a - 0.3611 * r - 4.2030)))
    droid = 1 / (1 + np.exp(-(2.3559 * c + 0.7409 * o + 0.3487 * a - 1.0443 * r - 1.7825)))
    assert PUBLISHED["libero"].probability(found)[0] == pytest.approx(libero)
    assert PUBLISHED["droid"].probability(found)[0] == pytest.approx(droid)
    assert np.isnan(PUBLISHED["libero"].probability(found)[4])


def test_a_fit_is_scikit_learns_and_tells_its_labels():
    rng = np.random.default_rng(0)
    features = random_features(3, m=40)
    found = episode_statistics(FeatureSteps.from_dense(features, EPISODE))
    chosen = np.flatnonzero(found.alive)[:30]
    labels = found.coverage[chosen] + 0.2 * rng.standard_normal(30) > 0.7
    own = fit(found, chosen.tolist(), labels)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(found.matrix[chosen], labels)
    np.testing.assert_allclose(own.weights, theirs.coef_[0], rtol=1e-4, atol=1e-6)
    assert own.intercept == pytest.approx(float(theirs.intercept_[0]), rel=1e-4)
    assert own.accuracy == theirs.score(found.matrix[chosen], labels) and own.fitted == 30
    left_out = [
        LogisticRegression(tol=1e-10, max_iter=10_000)
        .fit(np.delete(found.matrix[chosen], i, 0), np.delete(labels, i))
        .predict(found.matrix[chosen][i : i + 1])[0] == labels[i]
        for i in range(30)
    ]  # fmt: skip
    assert own.left_out == np.mean(left_out)
    # one label of a kind: the fit without it has one kind only
    alone = np.arange(30) == 0
    assert np.isfinite(fit(found, chosen.tolist(), alone).left_out)


def planted() -> FeatureSteps:
    """20 episodes of 20 steps; 0: at one time of every episode; 1: as often, all in one episode; 2: at random times."""
    rng = np.random.default_rng(5)
    episode, values = np.repeat(np.arange(20), 20), np.zeros((400, 3), np.float32)
    values[3::20, 0] = 1
    values[40:60, 1] = 1
    values[rng.choice(400, 20, replace=False), 2] = 1
    return FeatureSteps.from_dense(torch.from_numpy(values), episode)


def test_the_null_tells_memorised_from_rare():
    found = generality(planted(), PUBLISHED["libero"], n_shuffles=40)
    assert found.statistics.frequency.tolist() == [0.05, 0.05, 0.05]
    assert found.probability[1] < found.null[1] and found.p_value[1] == pytest.approx(1 / 41)
    assert found.p_value[2] > 0.05 and found.statistics.coverage[0] == 1.0
    # equally frequent, so that the null is the same for all
    assert np.ptp(found.null) < 0.1
    again = generality(planted(), PUBLISHED["libero"], n_shuffles=40)
    np.testing.assert_array_equal(found.p_value, again.p_value)


def test_shuffling_keeps_frequency_size_and_company():
    steps = FeatureSteps.from_dense(random_features(6), EPISODE)
    moved = steps.shuffled(np.random.default_rng(1))
    np.testing.assert_array_equal(moved.frequency, steps.frequency)
    assert not np.array_equal(moved.row, steps.row)
    together = [
        sorted(tuple(sorted(zip(s.feature[s.row == r], s.value[s.row == r], strict=True))) for r in range(s.n_steps))
        for s in (steps, moved)
    ]
    assert together[0] == together[1]


def test_the_correlation_with_frequency_is_spearmans():
    steps = FeatureSteps.from_dense(random_features(8, 30), EPISODE)
    found = generality(steps, PUBLISHED["droid"], n_shuffles=1)
    alive = found.statistics.alive
    expected = spearmanr(found.probability[alive], found.statistics.frequency[alive]).statistic
    assert found.frequency_correlation == pytest.approx(expected)
    assert found.general == np.mean(found.probability[alive] >= 0.5)
    flat = Generality((0.0, 0.0, 0.0, 0.0), 1.0)
    assert np.isnan(generality(steps, flat, n_shuffles=1).frequency_correlation)


def test_mistakes_are_named():
    features = random_features(0)
    steps = FeatureSteps.from_dense(features, EPISODE)
    found = episode_statistics(steps)
    with pytest.raises(ValueError, match="must stand together: those of \\[1\\]"):
        FeatureSteps.from_dense(features[:3], [1, 2, 1])
    broken = features.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 features are not finite"):
        FeatureSteps.from_dense(broken, EPISODE)
    with pytest.raises(ValueError, match=r"feature must be in 0..3, got 9 to 9"):
        FeatureSteps.of([0], [9], [1.0], [0], 4)
    with pytest.raises(ValueError, match="must be \\[20 m\\]"):
        FeatureSteps.from_dense(features[:3], EPISODE)
    with pytest.raises(ValueError, match="no steps"):
        steps.chosen(EPISODE > 100)
    with pytest.raises(ValueError, match="on must be 0 or more"):
        episode_statistics(steps, -1.0)
    with pytest.raises(ValueError, match="labels of both kinds"):
        fit(found, [0, 1], [True, True])
    with pytest.raises(ValueError, match=r"features \[4\] are never active"):
        fit(found, [0, 4], [True, False])
    with pytest.raises(ValueError, match=r"different numbers in 0..11"):
        fit(found, [0, 0], [True, False])
    with pytest.raises(ValueError, match="penalty must be positive"):
        fit(found, [0, 1], [True, False], 0.0)
    with pytest.raises(ValueError, match="n_shuffles"):
        generality(steps, PUBLISHED["libero"], n_shuffles=0)
    with pytest.raises(ValueError, match="none of 12 features is ever active"):
        generality(FeatureSteps.from_dense(torch.zeros(20, 12), EPISODE), PUBLISHED["libero"])
