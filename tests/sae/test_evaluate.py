"""Evaluation: numbers by their definitions, from tensors and sources, and what is refused. Normalisation, medians."""

import pytest
import torch
from toy_saes import SITE, D, settings, source, tokens

from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.evaluate import evaluate, evaluate_all
from hooked_vla.sae.initialise import geometric_median
from hooked_vla.sae.normalise import Normalisation
from hooked_vla.sae.presets import preset
from hooked_vla.sae.source import TensorSource

X = tokens(700, seed=6)


def made(architecture: str = "topk", **changes: object) -> SparseAutoencoder:
    sae = SparseAutoencoder(settings(architecture, **changes)).eval()
    sae.start(source().sample(500)[SITE])
    return sae


def test_figures_by_their_definitions() -> None:
    sae = made()
    found = evaluate(sae, X, batch_size=128)
    with torch.no_grad():
        missed, features = (X - sae(X)).double(), sae.encode(X)
    total = (X.double() - X.double().mean(0)).square().sum()
    assert found.rows == 700
    assert found.fvu == pytest.approx(float(missed.square().sum() / total), rel=1e-6)
    explained = 1 - float(missed.var(0, correction=0).sum() / X.double().var(0, correction=0).sum())
    assert found.explained_variance == pytest.approx(explained, rel=1e-6)
    assert found.l0 == pytest.approx(float((features != 0).sum(1).float().mean()))
    torch.testing.assert_close(found.density, (features != 0).double().mean(0))
    assert found.dead_share == float((found.density == 0).double().mean())
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(X, sae(X)).mean()), rel=1e-5)
    assert found.negative_share == 0
    assert set(found.to_json()) == {"rows", "explained_variance", "fvu", "cosine", "relative_length", "l0",
                                    "dead_share", "negative_share", "density_percentiles"}  # fmt: skip


def test_an_autoencoder_that_gives_the_mean_explains_nothing() -> None:
    sae = made("relu")
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_dec.copy_(sae.normalisation.normalise(X).mean(0))
    found = evaluate(sae, X)
    assert found.fvu == pytest.approx(1, abs=1e-5) and found.explained_variance == pytest.approx(0, abs=1e-5)
    assert (found.l0, found.dead_share) == (0, 1)


def test_one_that_is_off_by_a_constant_explains_the_variance_and_misses_the_rest() -> None:
    sae = SparseAutoencoder(settings("topk", n_features=24, k=24, relu=False, normalisation="none")).eval()
    with torch.no_grad():
        sae.w_enc.copy_(torch.eye(D))
        sae.w_dec.copy_(torch.eye(D))
    assert evaluate(sae, X).fvu == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        sae.b_enc.fill_(3.0)
    found = evaluate(sae, X)
    assert found.explained_variance == pytest.approx(1, abs=1e-6)
    assert found.fvu == pytest.approx(9 * D * 700 / float((X - X.mean(0)).square().sum()), rel=1e-4)
    assert 0 < found.negative_share < 0.5


def test_sources_tensors_and_several_at_once_agree() -> None:
    saes = [made(), made("relu")]
    rows = TensorSource({SITE: X}, passes=1, shuffle=False)
    together = evaluate_all(saes, rows, 512, 100)
    for sae, found in zip(saes, together, strict=True):
        alone = evaluate(sae, {SITE: X[:512]})
        assert found.rows == alone.rows == 512
        assert found.fvu == pytest.approx(alone.fvu, rel=1e-9)


def test_bad_rows_are_named() -> None:
    sae = made()
    with pytest.raises(ValueError, match=rf"no rows of {SITE}; there are \['other'\]"):
        evaluate(sae, {"other": X})
    with pytest.raises(ValueError, match="24 wide, got 23"):
        evaluate(sae, X[:, :23])
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        evaluate(sae, X[:0])
    with pytest.raises(ValueError, match="all 8 rows are equal"):
        evaluate(sae, torch.ones(8, D))
    spoiled = X.clone()
    spoiled[5, 1] = torch.inf
    with pytest.raises(ValueError, match=f"{SITE}: 1 of 700 rows are not finite, first row 5, channel 1"):
        evaluate(sae, spoiled)
    transcoder = SparseAutoencoder(
        settings("transcoder", output_site="other", d_output=12, subtract_decoder_bias=False)
    )
    with pytest.raises(ValueError, match="a transcoder needs rows of"):
        evaluate(transcoder, X)


@pytest.mark.parametrize("kind", ["none", "zscore", "mean_norm", "mean_square"])
def test_normalisations_do_what_their_names_say_and_come_undone(kind: str) -> None:
    normalisation = Normalisation(kind, D)
    normalisation.fit(X, "x")
    y = normalisation.normalise(X)
    torch.testing.assert_close(normalisation.undo(y), X, rtol=1e-5, atol=1e-5)
    if kind == "zscore":
        torch.testing.assert_close(y.mean(0), torch.zeros(D), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.std(0, correction=0), torch.ones(D), rtol=1e-5, atol=1e-5)
    lengths = {"mean_norm": (y.norm(dim=1).mean(), D**0.5), "mean_square": (y.square().sum(1).mean(), 1.0)}
    if kind in lengths:
        assert float(lengths[kind][0]) == pytest.approx(lengths[kind][1], rel=1e-5)


def test_token_norm_ignores_the_length_and_the_mean_of_a_token() -> None:
    sae = SparseAutoencoder(preset("drvla", "model", SITE, D, k=4)).eval()
    changed = X * torch.linspace(0.5, 4, 700)[:, None] + torch.linspace(-3, 3, 700)[:, None]
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(changed), sae.encode(X), rtol=1e-4, atol=1e-5)
        back = (sae(changed) - torch.linspace(-3, 3, 700)[:, None]) / torch.linspace(0.5, 4, 700)[:, None]
        torch.testing.assert_close(back, sae(X), rtol=1e-4, atol=1e-4)


def test_constant_channels_are_left_alone_and_constant_rows_refused() -> None:
    rows = X.clone()
    rows[:, 4] = 7.0
    normalisation = Normalisation("zscore", D)
    normalisation.fit(rows, "x")
    assert float(normalisation.scale[4]) == 1 and float(normalisation.normalise(rows)[:, 4].abs().max()) == 0
    with pytest.raises(ValueError, match="x: activations are constant over 5 rows"):
        normalisation.fit(torch.full((5, D), 2.0), "x")


def test_the_geometric_median_has_the_least_sum_of_distances_and_ignores_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(201, 6, generator=generator) + 2
    found = geometric_median(rows)

    def cost(point: torch.Tensor) -> float:
        return float((rows.double() - point).norm(dim=1).sum())

    for _ in range(20):
        assert cost(found) <= cost(found + 0.02 * torch.randn(6, generator=generator))
    rows[:20] = 1e4
    assert float((geometric_median(rows) - 2).norm()) < 1 < float((rows.mean(0) - 2).norm())
    assert torch.equal(geometric_median(rows[:1]), rows[0])
    with pytest.raises(ValueError, match="no rows"):
        geometric_median(rows[:0])
