"""Statistics of columns: those of all rows, whichever episodes the rows came in."""

import numpy as np
import pytest

from hooked_vla.rollouts.column_statistics import ColumnStatistics


def test_numbers():
    rows = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)
    found = ColumnStatistics.of_rows(rows)
    assert found.count == 101 and found.values["mean"] == pytest.approx(rows.mean(0), abs=1e-6)
    assert found.values["std"] == pytest.approx(rows.std(0), abs=1e-6)
    assert np.array_equal(found.values["min"], rows.min(0)) and np.array_equal(found.values["max"], rows.max(0))
    assert np.array_equal(found.values["q50"], np.sort(rows, axis=0)[50])
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q90", 0.9), ("q99", 0.99)):
        assert np.array_equal(found.values[name], np.quantile(rows, q, axis=0, method="inverted_cdf"))
    plain = found.to_plain(image=False)
    assert plain["count"] == [101] and np.shape(plain["mean"]) == (3,)
    assert ColumnStatistics.of_rows(np.arange(4) > 2).values["mean"] == pytest.approx([0.25])


def test_images_by_channel():
    images = np.random.default_rng(0).integers(0, 200, (5, 6, 7, 3), dtype=np.uint8)
    images[..., 2] = 51
    found = ColumnStatistics.of_images(images)
    flat = images.reshape(-1, 3) / 255
    assert found.count == 5
    for name, expected in (("min", flat.min(0)), ("max", flat.max(0)), ("mean", flat.mean(0)), ("std", flat.std(0))):
        assert found.values[name] == pytest.approx(expected, abs=1e-12)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        assert found.values[name] == pytest.approx(np.quantile(flat, q, axis=0, method="inverted_cdf"), abs=1e-12)
    plain = found.to_plain(image=True)
    assert np.shape(plain["std"]) == (3, 1, 1) and plain["q10"][2] == [[0.2]]


def test_merging_is_the_same_as_all_rows_at_once():
    rows = np.random.default_rng(0).normal(size=(90, 2)) * [1, 5] + [0, 40]
    parts = [ColumnStatistics.of_rows(part) for part in np.split(rows, [10, 15, 60])]
    merged = ColumnStatistics.merge([ColumnStatistics.merge(parts[:2]), *parts[2:]])
    whole = ColumnStatistics.of_rows(rows)
    assert merged.count == 90
    for name in ("min", "max", "mean", "std"):
        assert merged.values[name] == pytest.approx(whole.values[name], abs=1e-9)
    # quantiles: by the episodes' lengths
    expected = (10 * parts[0].values["q90"] + 5 * parts[1].values["q90"]) / 15
    assert ColumnStatistics.merge(parts[:2]).values["q90"] == pytest.approx(expected)
