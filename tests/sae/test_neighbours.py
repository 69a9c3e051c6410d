"""Neighbours by brute force, and descriptions that a search finds."""

import numpy as np
import pytest
import torch

from hooked_vla.sae import neighbours as module
from hooked_vla.sae.descriptions import Share, TextSearch, describe, words
from hooked_vla.sae.neighbours import coactive_neighbours, decoder_neighbours


@pytest.fixture(autouse=True, params=[512, 7])
def _block(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", request.param)


def test_decoder_neighbours_are_the_nearest_by_cosine():
    w = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    w[5] = -2 * w[6]
    # nearly one direction
    w[7] = 3 * w[8] + 1e-2 * w[9]
    found = decoder_neighbours(w, 4)
    cosine = torch.nn.functional.cosine_similarity(w[:, None], w[None], dim=-1).numpy()
    for i in range(30):
        others = sorted((j for j in range(30) if j not in (i, 3)), key=lambda j, i=i: -cosine[i, j])[:4]
        if i == 3:
            assert np.isnan(found.value[3]).all()
            continue
        assert found.feature[i].tolist() == others
        np.testing.assert_allclose(found.value[i], cosine[i, others], atol=1e-6)
    assert found.feature[7, 0] == 8 and found.value[7, 0] > 0.999


def test_coactive_neighbours_are_the_largest_shares_of_tokens():
    rng = np.random.default_rng(0)
    active = rng.random((200, 20)) < rng.random(20) * 0.4
    active[:, 4] = False
    active[:, 6] = active[:, 5]
    token, feature = np.nonzero(active)
    # tokens need not be counted from 0 without gaps
    found = coactive_neighbours(token * 1000 + 17, feature, 20, 3)
    for i in range(20):
        share = [
            (active[:, i] & active[:, j]).sum() / max((active[:, i] | active[:, j]).sum(), 1) if j != i else -1
            for j in range(20)
        ]
        best = sorted((s for s in share if s > 0), reverse=True)[:3]
        np.testing.assert_allclose(found.value[i][: len(best)], best, rtol=1e-6)
        assert all(share[j] == pytest.approx(v) for j, v in zip(found.feature[i], found.value[i], strict=True) if v > 0)
    assert np.isnan(found.value[4]).all() and found.value[5, 0] == 1.0 and found.feature[5, 0] == 6
    assert np.isnan(coactive_neighbours(token[:0], feature[:0], 20, 3).value).all()


@pytest.mark.parametrize("n", [0, 5])
def test_as_many_neighbours_as_there_are(n):
    with pytest.raises(ValueError, match=r"n must be in 1..4"):
        decoder_neighbours(torch.eye(5), n)


def test_a_description_names_what_stands_out():
    shares = [
        Share("phase", "grasp", 0.62, 3.14), Share("phase", "reach", 0.38, 1.2), Share("task", "red-cyan", 0.9, 9.0),
        Share("task", "blue-cyan", 0.1, 8.0),
    ]  # fmt: skip
    assert describe(shares, ["phase=grasp"], ["general"]) == (
        "phase grasp 62 % (×3.1); task red-cyan 90 % (×9.0); tells phase=grasp; general"
    )
    assert describe(shares[1:2]) == "no label stands out"
    many = [Share("direction", name, 0.3, 2.0 + i) for i, name in enumerate(("+x", "-x", "+y"))]
    assert describe(many) == "direction +y 30 % (×4.0); direction -x 30 % (×3.0)"


def test_a_search_finds_words_the_rarer_first():
    texts = {
        3: "phase grasp 62 % (×3.1); task red-cyan 90 %", 7: "phase grasp 50 %", 9: "task red-orange 40 %",
        11: "segment image:wrist 80 %; direction +z 40 %", 12: "phase reach 60 %; direction -z 40 %",
    }  # fmt: skip
    search = TextSearch(texts)
    assert search("grasp red", 5)[0][0] == 3
    assert {number for number, _ in search("grasp red", 5)} == {3, 7, 9}
    assert [number for number, _ in search("wrist", 5)] == [11] == [number for number, _ in search("+z", 5)]
    assert [number for number, _ in search("gras", 5)] == [number for number, _ in search("GRASP", 5)]
    assert search("gras", 5)[0][1] < search("grasp", 5)[0][1]
    assert search("banana", 5) == [] and len(search("grasp red", 1)) == 1
    assert words("task=Red-cyan image:wrist -z") == ["task", "red", "cyan", "image", "wrist", "-z"]
    with pytest.raises(ValueError, match="nothing to search for"):
        search("...", 3)
