"""SAELens's folders: `write` makes what its `SAE.load_from_disk` reads, `read` reads what its `save_model` wrote.

FOLDER/cfg.json, FOLDER/sae_weights.safetensors; format as of sae-lens 6.54. Dictionaries are [d m] and [m d] there.
Normalisations are folded into the weights; BatchTopK and Matryoshka are written as JumpReLU, which they are in use.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.folders import write_json
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.sae.autoencoder import SparseAutoencoder, folded
from hooked_vla.sae.config import SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# whose format this is; without it sae-lens takes a folder for one of before version 6, and forgets its metadata
FORMAT = "6.54.12"
# sae_lens/saes/sae.py: SAEConfig.normalize_activations
_AS_IT_IS = ("none", None)
# ours -> what it is there; the tensors that are there, and their names here
_THERE = {
    "relu": "standard", "topk": "topk", "temporal": "topk", "batch_topk": "jumprelu", "matryoshka": "jumprelu",
    "jumprelu": "jumprelu", "gated": "gated", "transcoder": "transcoder",
}  # fmt: skip
_HERE = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated", "transcoder": "transcoder"}
_BIASES = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
# the least threshold whose logarithm is finite; as good as 0
_LEAST = 1e-300


def write(sae: SparseAutoencoder, folder: str | Path, drop_negative: bool = False) -> None:
    """Write an autoencoder as SAELens saves its own; each file appears when complete, the config last.

    drop_negative: as in `SparseAutoencoder.splice`, since SAELens's top-k has a ReLU.
    Raises ValueError for what SAELens has not: a normalisation that is each token's own, top-k transcoders, and top-k
    without ReLU unless drop_negative.
    """
    c = sae.config
    if c.normalisation == "token_norm":
        raise ValueError(f"{c.label}: token_norm does not fold into weights, and SAELens has nothing like it")
    if c.architecture == "transcoder" and c.k is not None:
        raise ValueError(f"{c.label}: SAELens has no top-k transcoder")
    if not c.relu and not drop_negative:
        raise ValueError(f"{c.label}: SAELens's top-k has a ReLU; drop_negative=True leaves out what is below zero")
    there = _THERE[c.architecture]
    about: dict[str, Any] = {
        "d_in": c.d_model, "d_sae": c.n_features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": there != "transcoder", "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT, "model_name": c.model, "hook_name": c.site, "hooked_vla": c.to_json()},
        "architecture": there,
    }  # fmt: skip
    if there == "topk":
        about |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    if there == "transcoder":
        about |= {"d_out": c.d_decoded}
        about["metadata"] |= {"hook_name_out": c.output_site}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = sorted(_tensors(sae).items())
    write_safetensors(folder / WEIGHTS, [(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors], {})
    write_json(folder / CONFIG, about)


@torch.no_grad()
def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    c = sae.config
    if c.architecture == "transcoder":
        mean, scale = sae.normalisation.mean.double(), sae.normalisation.scale.double()
        after = sae.output_normalisation
        w_enc, w_dec = sae.w_enc.double() / scale, sae.w_dec.double() * after.scale.double()
        b_enc = sae.b_enc.double() - w_enc @ mean
        b_dec = sae.b_dec.double() * after.scale.double() + after.mean.double()
        made = {"W_enc": w_enc.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    elif c.architecture == "gated":
        scale, mean = sae.normalisation.scale.double(), sae.normalisation.mean.double()
        made = {
            "W_enc": (sae.w_enc.double() / scale).T, "b_gate": sae.b_enc, "b_mag": sae.magnitude_bias,
            "r_mag": sae.magnitude_scale, "W_dec": sae.w_dec.double() * scale,
            "b_dec": sae.b_dec.double() * scale + mean,
        }  # fmt: skip
    else:
        weights = folded(sae)
        made = {"W_enc": weights["w_enc"].T, "b_enc": weights["b_enc"], "W_dec": weights["w_dec"],
                "b_dec": weights["b_dec"]}  # fmt: skip
        if "threshold" in weights and _THERE[c.architecture] == "jumprelu":
            made["threshold"] = weights["threshold"].expand(c.n_features)
    return {name: each.detach().float().cpu().contiguous() for name, each in made.items()}


def read(folder: str | Path, model: str | None = None, site: str | None = None) -> SparseAutoencoder:
    """An autoencoder that SAELens saved. model, site: what it is of, where its metadata do not say or are wrong.

    Raises FileNotFoundError; ValueError for files that are damaged, and for what is not understood: other
    architectures, activations normalised on the way in, tensors of other shapes.
    """
    folder = Path(folder)
    about = _config(folder / CONFIG)
    tensors = _weights(folder / WEIGHTS)
    name = about.get("architecture", "standard")
    if name not in _HERE:
        raise ValueError(f"{folder / CONFIG}: architecture {name!r} is not read; those that are: {list(_HERE)}")
    for key, wanted in (("normalize_activations", _AS_IT_IS), ("reshape_activations", _AS_IT_IS)):
        if about.get(key) not in wanted:
            raise ValueError(f"{folder / CONFIG}: {key} is {about[key]!r}, which is not folded into the weights; only "
                             "'none' is read")  # fmt: skip
    if about.get("finetuning_scaling_factor") or about.get("activation_fn", about.get("activation_fn_str")) == "topk":
        raise ValueError(f"{folder / CONFIG} is of a sae-lens before 6; load and save it with a newer one")
    # before version 6 they stood in the config itself
    metadata = about | (about.get("metadata") or {})
    transcodes = name == "transcoder"
    config = SAEConfig(
        model=_known(folder, "model", model, metadata.get("model_name")),
        site=_known(folder, "site", site, metadata.get("hook_name")),
        d_model=about["d_in"], n_features=about["d_sae"], architecture=_HERE[name], normalisation="none", training=None,
        k=about.get("k") if name == "topk" else None, unit_decoder=False,
        subtract_decoder_bias=bool(about.get("apply_b_dec_to_input", True)) or name == "gated",
        output_site=_known(folder, "output_site", None, metadata.get("hook_name_out")) if transcodes else None,
        d_output=about.get("d_out") if transcodes else None,
    )  # fmt: skip
    sae = SparseAutoencoder(config)
    _check_shapes(folder, tensors, _shapes(config, name))
    with torch.no_grad():
        _fill(sae, {key: tensor.float() for key, tensor in tensors.items()}, about)
    return sae.eval()


def _fill(sae: SparseAutoencoder, found: dict[str, Tensor], about: dict[str, Any]) -> None:
    c = sae.config
    w_enc, w_dec, b_enc = found["W_enc"].T, found["W_dec"], found.get("b_enc", found.get("b_gate"))
    assert b_enc is not None
    if about.get("rescale_acts_by_decoder_norm"):
        # sae_lens/saes/topk_sae.py: features are chosen by what they add, which is their length with rows of length 1
        length = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * length[:, None], b_enc * length, w_dec / length[:, None]
    if c.architecture == "gated":
        shift = torch.zeros(()) if about.get("apply_b_dec_to_input", True) else w_enc @ found["b_dec"]
        b_enc = b_enc + shift
        sae.magnitude_scale.copy_(found["r_mag"])
        sae.magnitude_bias.copy_(found["b_mag"] + shift * found["r_mag"].exp())
    if c.architecture == "jumprelu":
        # a threshold below 0 is one of 0 behind the ReLU
        sae.log_threshold.copy_(found["threshold"].double().clamp_min(_LEAST).log())
    sae.w_enc.copy_(w_enc)
    sae.w_dec.copy_(w_dec)
    sae.b_enc.copy_(b_enc)
    sae.b_dec.copy_(found["b_dec"])


def _shapes(config: SAEConfig, name: str) -> dict[str, tuple[int, ...]]:
    d, m, d_out = config.d_model, config.n_features, config.d_decoded
    found = {"W_enc": (d, m), "W_dec": (m, d_out), "b_dec": (d_out,)}
    return found | {bias: (m,) for bias in _BIASES.get(name, ("b_enc",))}


def _check_shapes(folder: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{folder / WEIGHTS}: tensors {found} are not those of its config, {expected}")
    if bad := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{folder / WEIGHTS} holds NaN or infinity in {bad}")


def _known(folder: Path, what: str, given: str | None, stored: Any) -> str:
    found = given or stored
    if not found:
        raise ValueError(f"{folder / CONFIG} does not say which {what} it is of: give {what}=")
    return str(found)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not a folder of SAELens")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not {"d_in", "d_sae"} <= set(found):
        raise ValueError(f"{path} must be an object with d_in and d_sae")
    return found


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
