"""Autoencoders in use: what encode, decode, splice and files agree on, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy_saes import SITE, D, settings, source, tokens

from hooked_vla.sae import files
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import nested_prefixes, preset
from hooked_vla.sae.splice import splice, weights_of


def disturbed(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Fitted to tokens, and every weight moved, so that no bias is zero and no row of length 1."""
    rows = source().sample(500)
    sae.start(rows[SITE], rows["other"] if sae.config.output_site else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        if "batch_threshold" in dict(sae.named_buffers()):
            sae.get_buffer("batch_threshold").fill_(0.4)
    return sae.eval()


CONFIGS = {
    "relu": settings("relu", normalisation="zscore"),
    "topk": settings("topk", normalisation="mean_norm"),
    "topk without relu": settings("topk", k=40, relu=False, normalisation="mean_norm", subtract_decoder_bias=False),
    "batch_topk": settings("batch_topk", normalisation="mean_square"),
    "jumprelu": settings("jumprelu", threshold=0.2, normalisation="none"),
    "gated": settings("gated", normalisation="zscore"),
    "matryoshka": settings("matryoshka", prefixes=nested_prefixes(64)),
    "transcoder": settings("transcoder", output_site="other", d_output=12, subtract_decoder_bias=False),
    "temporal": settings("temporal", normalisation="zscore"),
    "drvla": preset("drvla", "model", SITE, D, k=4),
}
MADE = {name: disturbed(SparseAutoencoder(config)) for name, config in CONFIGS.items()}
X = tokens(40, seed=5)


@pytest.mark.parametrize("name", MADE)
def test_forward_is_decode_of_encode(name: str) -> None:
    sae = MADE[name]
    features = sae.encode(X)
    assert features.shape == (40, sae.config.n_features)
    active = (features != 0).sum(1).float()
    assert 0 < float(active.mean()) < sae.config.n_features
    if sae.by_k:
        assert int(active.max()) <= (sae.config.k or 0)
    decoded = sae.decode(features, X) if name == "drvla" else sae.decode(features)
    torch.testing.assert_close(sae(X), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_any_leading_axes_give_the_same(name: str) -> None:
    sae = MADE[name]
    with torch.no_grad():
        flat, features = sae(X), sae.encode(X)
        torch.testing.assert_close(sae(X.view(2, 4, 5, D)).view(40, -1), flat, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.encode(X.view(8, 5, D)).view(40, -1), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(X[3]), flat[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_sparse_codes_are_the_dense_ones(name: str) -> None:
    sae = MADE[name]
    code = sae.encode_sparse(X)
    dense = torch.zeros(40, sae.config.n_features).scatter_add_(1, code.indices.long(), code.values)
    torch.testing.assert_close(dense, sae.encode(X).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "temporal"])
def test_spliced_it_reconstructs_the_same(name: str) -> None:
    sae = MADE[name]
    spliced = sae.splice()
    assert (spliced.k is not None) == sae.by_k
    weights = weights_of(spliced, torch.float32, X.device)
    found = splice(X, weights, spliced.k, False, None, None, None, None)
    with torch.no_grad():
        torch.testing.assert_close(found, sae(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_direction_is_what_a_feature_adds(name: str) -> None:
    sae = MADE[name]
    if sae.config.output_site is not None:
        with pytest.raises(ValueError, match="what a transcoder's feature adds"):
            sae.direction(3)
        return
    one = torch.zeros(1, sae.config.n_features)
    one[0, 3] = 1.0
    token = X[:1] - X[:1].mean()
    # at distance 1 from the centre
    token = sae.b_dec.detach() + token / token.norm() if name == "drvla" else token
    with torch.no_grad():
        added = sae.decode(one, token) - sae.decode(0 * one, token)
        torch.testing.assert_close(sae.direction(3), added[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no feature 99: its features are 0.."):
        sae.direction(99)


def test_what_cannot_be_spliced_says_how_it_can_be_used() -> None:
    with pytest.raises(ValueError, match=r"drop_negative=True leaves them out"):
        MADE["topk without relu"].splice()
    sae = MADE["topk without relu"]
    spliced = sae.splice(drop_negative=True)
    found = splice(X, weights_of(spliced, torch.float32, X.device), spliced.k, False, None, None, None, None)
    with torch.no_grad():
        positive = sae.decode(sae.encode(X).relu())
    torch.testing.assert_close(found, positive, rtol=1e-4, atol=1e-4)
    assert float((sae.encode(X) < 0).sum()) > 0
    with pytest.raises(ValueError, match=r"does not fold into weights.*fwd_hooks"):
        MADE["drvla"].splice()
    with pytest.raises(ValueError, match="it cannot be spliced"):
        MADE["transcoder"].splice()


@pytest.mark.parametrize("name", ["topk", "relu", "drvla"])
def test_forward_has_gradients_in_the_tokens(name: str) -> None:
    """As finite differences have them, where no feature changes sides."""
    sae = SparseAutoencoder(CONFIGS[name]).double().eval()
    sae.load_state_dict(MADE[name].state_dict())
    x = X[:3].double().requires_grad_()
    direction = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    towards = torch.randn(3, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sae(x) * towards).sum(), x)
    with torch.no_grad():
        ahead, behind = ((sae(x + s * 1e-6 * direction) * towards).sum() for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_narrow_tokens_come_back_narrow() -> None:
    with torch.no_grad():
        narrow = MADE["batch_topk"](X.bfloat16())
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), MADE["batch_topk"](X.bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_tokens_of_another_width_or_site_are_refused() -> None:
    sae = MADE["topk"]
    for call in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(ValueError, match=f"SAE of {SITE}: its tokens are 24 wide, got 23"):
            call(X[:, :23])
    with pytest.raises(ValueError, match="it has 64 features, got 63"):
        sae.decode(torch.zeros(2, 63))
    with pytest.raises(ValueError, match="give x to decode"):
        MADE["drvla"].decode(MADE["drvla"].encode(X))
    with pytest.raises(ValueError, match=rf"is of {SITE} \(model\), not of elsewhere"):
        sae.check_fits("elsewhere", 24)
    with pytest.raises(ValueError, match="24 wide, the model's are 25"):
        sae.check_fits(SITE, 25)
    sae.check_fits(SITE, 24)


@pytest.mark.parametrize("name", MADE)
def test_saved_it_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    MADE[name].save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config == MADE[name].config and not again.training
    for key, value in MADE[name].state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    sae = MADE["batch_topk"]
    sae.save_pretrained(tmp_path / "whole")
    sae.save_pretrained(tmp_path / "half", torch.float16)
    whole, half = ((tmp_path / each / "sae.safetensors").stat().st_size for each in ("whole", "half"))
    assert half < 0.75 * whole
    again = SparseAutoencoder.from_pretrained(tmp_path / "half")
    assert again.w_enc.dtype == torch.float32
    torch.testing.assert_close(again.w_enc, sae.w_enc, rtol=1e-3, atol=1e-3)
    large = SparseAutoencoder(CONFIGS["topk"])
    with torch.no_grad():
        large.w_dec[3] = 1e6
    with pytest.raises(ValueError, match=r"w_dec is not finite in torch\.float16"):
        large.save_pretrained(tmp_path / "large", torch.float16)
    assert not (tmp_path / "large").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder with sae\.safetensors.*comes with the package"):
        SparseAutoencoder.from_pretrained("nowhere")
    MADE["topk"].save_pretrained(tmp_path)
    weights, config = tmp_path / "sae.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        SparseAutoencoder.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(config.read_text().replace('"k": 4', '"k": 5'))
    with pytest.raises(ValueError, match=r"is not the config of sae\.safetensors"):
        SparseAutoencoder.from_pretrained(tmp_path)
    config.unlink()
    assert SparseAutoencoder.from_pretrained(tmp_path).config.k == 4
    with safe_open(weights, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors | {"w_enc": torch.zeros(3, 2)}, weights, metadata)
    with pytest.raises(ValueError, match=r"do not fit its config.*w_enc"):
        SparseAutoencoder.from_pretrained(tmp_path)
    save_file(tensors | {"b_enc": torch.full((64,), torch.nan)}, weights, metadata)
    with pytest.raises(ValueError, match=r"holds NaN or infinity in \['b_enc'\]"):
        SparseAutoencoder.from_pretrained(tmp_path)
    save_file(tensors, weights, metadata | {"format": "other"})
    with pytest.raises(ValueError, match="has format 'other'"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_shipped_ones_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHIPPED", tmp_path)
    MADE["topk"].save_pretrained(tmp_path / "policy" / SITE)
    assert files.shipped_saes() == [f"policy/{SITE}"]
    assert SparseAutoencoder.from_pretrained(f"policy/{SITE}").config.site == SITE
    with pytest.raises(FileNotFoundError, match=rf"\['policy/{SITE}'\]"):
        SparseAutoencoder.from_pretrained("policy/other")


def test_the_seed_decides_the_weights() -> None:
    first, same, other = (SparseAutoencoder(settings("topk", seed=seed)).w_enc for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
