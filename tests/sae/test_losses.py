"""What training minimises, term by term, and how dead features come back."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_saes import SITE, D, settings, source, tokens

from hooked_vla.sae.activations import Code
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.losses import Objective, contrast
from hooked_vla.sae.presets import preset
from hooked_vla.sae.resample import ENCODER_SHARE, resample
from hooked_vla.sae.trainer import settle_gradients

X = tokens(96, seed=2)


def objective(architecture: str, **changes: Any) -> Objective:
    made = Objective(SparseAutoencoder(settings(architecture, **changes)))
    rows = source().sample(500)
    made.start(rows[SITE], rows["other"] if architecture == "transcoder" else None)
    return made


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated", "temporal"])
@pytest.mark.parametrize("loss", ["mse", "sum", "fvu"])
def test_the_error_is_that_of_the_reconstruction(architecture: str, loss: str) -> None:
    """Without other terms, in normalised units; a gated one reconstructs by its gate as well."""
    made = objective(architecture, loss=loss, penalty=0.0, aux_k=0, normalisation="zscore", threshold=0.5)
    terms = made(X, 0)
    sae = made.sae
    with torch.no_grad():
        missed = (sae.normalisation.normalise(X) - sae.normalisation.normalise(sae(X))).square()
        expected = {"mse": missed.mean(), "sum": missed.sum(1).mean(), "fvu": missed.sum(1).mean() / made.variance}
        if architecture == "gated":
            gate = ((sae.inputs(X)) @ sae.w_enc.T + sae.b_enc).relu() @ sae.w_dec + sae.b_dec
            by_gate = (sae.normalisation.normalise(X) - gate).square()
            expected |= {"mse": expected["mse"] + by_gate.mean()}
            expected |= {"sum": expected["sum"] + by_gate.sum(1).mean()}
            expected |= {"fvu": expected["fvu"] + by_gate.sum(1).mean() / made.variance}
    torch.testing.assert_close(terms.loss.double(), expected[loss].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.fvu.double(), missed.sum(1).mean() / made.variance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.l0, (sae.encode(X) != 0).sum(1).float().mean())
    assert torch.equal(terms.fired, (sae.encode(X) != 0).any(0))


def test_token_norm_counts_errors_in_the_models_units() -> None:
    made = Objective(SparseAutoencoder(preset("drvla", "model", SITE, D, k=4)))
    made.start(source().sample(500)[SITE])
    with torch.no_grad():
        missed = (X - made.sae(X)).square().sum(1).mean()
        variance = (source().sample(500)[SITE] - source().sample(500)[SITE].mean(0)).square().sum(1).mean()
    torch.testing.assert_close(made(X, 0).loss, missed / variance, rtol=1e-5, atol=1e-6)


def test_penalties_are_those_of_the_papers() -> None:
    plain, with_l1 = objective("relu", penalty=0.0), objective("relu", penalty=0.3)
    sae = plain.sae
    l1 = (sae.encode(X) * sae.w_dec.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(with_l1(X, 0).loss - plain(X, 0).loss, 0.3 * l1, rtol=1e-4, atol=1e-6)
    none, with_l0 = (objective("jumprelu", penalty=p, threshold=0.5) for p in (0.0, 0.3))
    l0 = (none.sae.encode(X) > 0).sum(1).float().mean()
    torch.testing.assert_close(with_l0(X, 0).loss - none(X, 0).loss, 0.3 * l0, rtol=1e-4, atol=1e-6)


def test_gates_are_not_moved_by_magnitudes() -> None:
    """What a gated autoencoder's magnitudes miss has no gradient in the gate's bias."""
    made = objective("gated", penalty=0.0)
    sae = made.sae
    before = made(X, 0)
    (gate,) = torch.autograd.grad(before.loss, sae.b_enc, retain_graph=True)
    with torch.no_grad():
        sae.magnitude_bias.add_(0.1)
    (moved,) = torch.autograd.grad(made(X, 0).loss, sae.b_enc)
    torch.testing.assert_close(gate, moved)


def test_matryoshka_is_the_mean_over_prefixes() -> None:
    made = objective("matryoshka", prefixes=(8, 24, 64), aux_k=0, loss="sum")
    sae = made.sae
    loss = made(X, 0).loss
    with torch.no_grad():
        z = sae.inputs(X) @ sae.w_enc.T + sae.b_enc
        f = torch.where(z >= z.flatten().topk(4 * 96).values[-1], z, 0)
        errors = [
            (sae.normalisation.normalise(X) - f[:, :m] @ sae.w_dec[:m] - sae.b_dec).square().sum(1).mean()
            for m in (8, 24, 64)
        ]
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-5, atol=1e-5)


def test_contrast_is_infonce_between_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(12, 20, generator=generator) * (torch.rand(12, 20, generator=generator) < 0.4)
    values, indices = dense.topk(12, dim=1)
    found = contrast(Code(values, indices.int()), 6, 20, 0.5)
    unit = torch.nn.functional.normalize(dense, dim=1)
    logits = unit[:6] @ unit[6:].T / 0.5
    right = torch.arange(6)
    cross = torch.nn.functional.cross_entropy
    torch.testing.assert_close(found, (cross(logits, right) + cross(logits.T, right)) / 2)


def gradients(made: Objective, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*made.sae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka", "relu", "transcoder"])
def test_gradients_are_those_of_dense_products(architecture: str) -> None:
    """Through the sparse kernels, and with the decoder's bias folded away, as plain autograd has them."""
    changes = {
        "matryoshka": {"prefixes": (16, 64)},
        "transcoder": {"output_site": "other", "d_output": 12, "subtract_decoder_bias": False},
    }.get(architecture, {})
    made = objective(architecture, aux_k=0, loss="sum", penalty=0.0, normalisation="none", **changes)
    sae, output = made.sae, X @ torch.ones(D, 12) if architecture == "transcoder" else None
    found = gradients(made, made(X, 0, output).loss)
    centred = X - sae.b_dec if sae.config.subtract_decoder_bias else X
    z = centred @ sae.w_enc.T + sae.b_enc
    if architecture == "relu":
        f = z.relu()
    else:
        least = z.flatten().topk(4 * 96).values[-1] if not sae.by_k else z.topk(4, dim=1).values[:, -1:]
        f = torch.where(z >= least, z.relu(), 0)
    target = X if output is None else output
    sizes = sae.config.prefixes or (64,)
    losses = [(f[:, :m] @ sae.w_dec[:m] + sae.b_dec - target).square().sum(1).mean() for m in sizes]
    expected = gradients(made, torch.stack(losses).mean())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_decoder_rows_are_not_pulled_along_themselves() -> None:
    made = objective("topk", clip=0.01)
    made(X, 0).loss.backward()
    before = made.sae.w_dec.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
    settle_gradients(made)
    after = made.sae.w_dec.grad
    assert after is not None and float((before * made.sae.w_dec).sum(1).abs().max()) > 1e-3
    assert float((after * made.sae.w_dec).sum(1).abs().max()) < 1e-6
    total = torch.stack([p.grad.norm() for p in made.sae.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(total, torch.tensor(0.01), rtol=1e-4, atol=1e-6)


def buried(**changes: Any) -> tuple[Objective, torch.optim.Adam]:
    """Half of the features are far from being active."""
    made = objective("topk", dead_after=96 * 3, **changes)
    with torch.no_grad():
        made.sae.b_enc[32:] = -20.0
    made.silent[32:] = 96 * 3
    return made, torch.optim.Adam(made.sae.parameters(), lr=0.05)


def alive_after(made: Objective, optimizer: torch.optim.Adam, steps: int) -> int:
    for number in range(steps):
        terms = made(tokens(96, seed=50 + number), number)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    return int((made.sae.encode(tokens(2000, seed=7)) != 0).any(0)[32:].sum())


def test_auxk_brings_dead_features_back() -> None:
    """They reconstruct what is left, although they are far from being active; without it they stay dead."""
    assert alive_after(*buried(aux_k=0), steps=60) == 0
    assert alive_after(*buried(aux_k=16, aux_weight=1.0), steps=60) > 8


def test_resampling_starts_dead_features_anew() -> None:
    made, optimizer = buried(aux_k=0)
    made(X, 0).loss.backward()
    optimizer.step()
    kept = made.sae.w_dec[:32].detach().clone()
    length = float(made.sae.w_enc[:32].detach().norm(dim=1).mean())
    assert resample(made, optimizer.state, 1, X) == 32
    sae = made.sae
    assert torch.equal(sae.w_dec[:32], kept) and not bool(made.silent.any())
    torch.testing.assert_close(sae.w_dec[32:].norm(dim=1), torch.ones(32))
    torch.testing.assert_close(sae.w_enc[32:], sae.w_dec[32:] * ENCODER_SHARE * length)
    directions = torch.nn.functional.normalize(sae.inputs(X), dim=1)
    assert float((sae.w_dec[32:] @ directions.T).max(1).values.min()) > 0.9999
    memory = optimizer.state[sae.w_dec]["exp_avg"]
    assert not bool(memory[32:].any()) and bool(memory[:32].any())
    assert resample(made, optimizer.state, 2, X) == 0
    assert int((sae.encode(tokens(2000, seed=7)) != 0).any(0)[32:].sum()) > 8


def test_resampling_is_decided_by_seed_and_step() -> None:
    drawn = []
    for number in (4, 4, 5):
        made, optimizer = buried(aux_k=0)
        resample(made, optimizer.state, number, X)
        drawn.append(made.sae.w_dec.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
