"""SAELens's format: what it saved is read, and what is written is what it reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_saes import SITE, settings, source, tokens

from hooked_vla.sae import saelens
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import nested_prefixes, preset

GOLDEN = Path(__file__).parents[1] / "golden" / "saelens"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = sorted(path.name for path in GOLDEN.iterdir())


def made(architecture: str, **changes: object) -> SparseAutoencoder:
    """An autoencoder fitted to tokens, its weights disturbed: nothing in it is zero or of length 1."""
    sae = SparseAutoencoder(settings(architecture, **changes))
    rows = source().sample(500)
    sae.start(rows[SITE], rows["other"] if architecture == "transcoder" else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        if architecture in ("batch_topk", "matryoshka"):
            sae.get_buffer("batch_threshold").fill_(0.4)
    return sae.eval()


def test_the_fixture_covers_what_is_read() -> None:
    assert {name.split("_")[0] for name in NAMES} == {"standard", "topk", "jumprelu", "gated", "transcoder"}
    with safe_open(GOLDEN / "topk" / "expected.safetensors", framework="pt") as file:
        assert file.metadata()["sae_lens"].split(".")[0] == "6"


@pytest.mark.parametrize("name", NAMES)
def test_what_sae_lens_saved_is_read(name: str) -> None:
    """Features and outputs are those that sae-lens recorded."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    sae = saelens.read(GOLDEN / name)
    assert (sae.config.model, sae.config.site) == ("tiny", "expert.blocks.0.hook_resid_post")
    torch.testing.assert_close(sae.encode(expected["x"]), expected["features"], **CLOSE)
    torch.testing.assert_close(sae(expected["x"]), expected["output"], **CLOSE)
    assert 0 < float((expected["features"] != 0).float().mean()) < 1
    if sae.config.output_site is None:
        spliced = sae.splice()
        assert (spliced.k, spliced.n_features) == (3 if "topk" in name else None, 10)


WRITTEN = {
    "relu": made("relu", normalisation="zscore"),
    "relu, plain input": made("relu", normalisation="mean_norm", subtract_decoder_bias=False),
    "topk": made("topk", normalisation="none"),
    "topk, free decoder": made("topk", normalisation="mean_square", unit_decoder=False),
    "temporal": made("temporal", normalisation="zscore"),
    "batch_topk": made("batch_topk", normalisation="mean_norm"),
    "matryoshka": made("matryoshka", prefixes=nested_prefixes(64), normalisation="zscore"),
    "jumprelu": made("jumprelu", normalisation="mean_norm", threshold=0.3),
    "gated": made("gated", normalisation="zscore"),
    "transcoder": made("transcoder", k=None, output_site="other", d_output=12, subtract_decoder_bias=False,
                       normalisation="zscore"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_back_as_the_same(name: str, tmp_path: Path) -> None:
    sae, x = WRITTEN[name], tokens(64, seed=3)
    saelens.write(sae, tmp_path)
    again = saelens.read(tmp_path)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-4)
    assert (again.config.site, again.config.model) == (sae.config.site, sae.config.model)
    # what sae-lens does not know of it is kept beside
    kept = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hooked_vla"]
    assert type(sae.config).from_json(kept) == sae.config


@pytest.mark.parametrize("name", WRITTEN)
def test_installed_sae_lens_reads_what_is_written_and_we_read_what_it_saves(name: str, tmp_path: Path) -> None:
    lens = pytest.importorskip("sae_lens", reason="needs: pip install 'sae-lens>=6.54,<7'")
    sae, x = WRITTEN[name], tokens(64, seed=3)
    saelens.write(sae, tmp_path / "ours")
    theirs = lens.SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-4)
    theirs.save_model(tmp_path / "theirs")
    back = saelens.read(tmp_path / "theirs")
    once = saelens.read(tmp_path / "ours")
    for key, value in once.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def copied(name: str, tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    about = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(about | changes))
    return folder


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cfg\.json does not exist"):
        saelens.read(tmp_path)
    with pytest.raises(ValueError, match="architecture 'skip_transcoder' is not read"):
        saelens.read(copied("transcoder", tmp_path / "a", architecture="skip_transcoder"))
    with pytest.raises(ValueError, match="normalize_activations is 'layer_norm'"):
        saelens.read(copied("topk", tmp_path / "b", normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="is of a sae-lens before 6"):
        saelens.read(copied("standard", tmp_path / "g", activation_fn_str="topk", activation_fn_kwargs={"k": 3}))
    with pytest.raises(ValueError, match="does not say which site"):
        saelens.read(copied("topk", tmp_path / "c", metadata={"model_name": "tiny"}))
    assert saelens.read(tmp_path / "c" / "topk", site="here").config.site == "here"
    with pytest.raises(ValueError, match=r"k must be in 1\.\.10, the number of features, got 11"):
        saelens.read(copied("topk", tmp_path / "d", k=11))
    with pytest.raises(ValueError, match="are not those of its config"):
        saelens.read(copied("topk", tmp_path / "e", d_in=7))
    folder = copied("topk", tmp_path / "f")
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="truncated"):
        saelens.read(folder)
    tensors = load_file(GOLDEN / "topk" / "sae_weights.safetensors")
    tensors["W_dec"][3, 2] = torch.inf
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinity in \['W_dec'\]"):
        saelens.read(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        saelens.read(folder)


def test_what_sae_lens_has_not_is_not_written(tmp_path: Path) -> None:
    for config, why in (
        (preset("drvla", "model", SITE, 24), "token_norm"),
        (preset("atlas", "model", SITE, 24), "has a ReLU"),
        (settings("transcoder", output_site="other", d_output=12, subtract_decoder_bias=False), "no top-k transcoder"),
    ):
        with pytest.raises(ValueError, match=why):
            saelens.write(SparseAutoencoder(config), tmp_path / "out")
        assert not (tmp_path / "out").exists()
