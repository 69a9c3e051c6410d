"""Settings by name: those of published studies of VLAs, and ours. Each figure is from the source that is named."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from hooked_vla.sae.config import SAEConfig, Training

# dictionary_learning: trainers/batch_top_k.py, for dictionaries of 16,384 features
_RATE, _RATE_FEATURES = 2e-4, 1 << 14
# arXiv 2503.17547, section 4: prefixes of the dictionary, in 32nds
_PREFIXES = (1, 3, 7, 15, 32)


def atlas(model: str, site: str, d_model: int, steps: int) -> SAEConfig:
    """Action Atlas (arXiv 2603.19233; its experiments/train_sae.py): top-k without ReLU, z-scores, no constraint.

    Published: at most 100 epochs over at most 500,000 tokens, that is 12,200 steps, ended when the loss has not
    fallen for 5 epochs; the ending is left out.
    """
    training = Training(
        steps=steps, batch_size=4096, rate=3e-4, seed=0, loss="mse", initial_bias="zeros",
        # torch's nn.Linear draws rows of this length, in the mean
        decoder_length=1 / sqrt(3), init_rows=50_000,
    )  # fmt: skip
    return SAEConfig(
        model=model, site=site, d_model=d_model, n_features=8 * d_model, architecture="topk", k=64, relu=False,
        normalisation="zscore", subtract_decoder_bias=False, unit_decoder=False, training=training,
    )  # fmt: skip


def atlas_temporal(model: str, site: str, d_model: int, steps: int) -> SAEConfig:
    """Action Atlas' temporal variant (its experiments/train_temporal_sae.py): adjacent steps drawn together."""
    config = atlas(model, site, d_model, steps)
    return config.changed(architecture="temporal", batch_size=512, rate=1e-3, contrast=1.0, temperature=1.0)


def drvla(model: str, site: str, d_model: int, steps: int) -> SAEConfig:
    """DrVLA (arXiv 2603.19183; its public code): every token over its own length, no biases but a centre, AuxK.

    For means over all tokens of a step. k is 64 in the action expert, 100 elsewhere. Published: 100 epochs. AuxK is
    measured against what is missed of normalised tokens, not of the model's.
    """
    k, m, batch_size = 64 if site.startswith("expert.") else 100, d_model, 4096
    training = Training(
        steps=steps, batch_size=batch_size, rate=1e-4, seed=0, eps=6.25e-10, warmup=steps // 10, clip=1.0, loss="fvu",
        aux_k=512, aux_weight=1 / 32, dead_after=500 * batch_size, encoder_scale=sqrt(min(k, m) / m),
    )  # fmt: skip
    return SAEConfig(
        model=model, site=site, d_model=d_model, n_features=m, architecture="topk", k=min(k, m),
        normalisation="token_norm", encoder_bias=False, pooling="mean", training=training,
    )  # fmt: skip


def event(model: str, site: str, d_model: int, steps: int) -> SAEConfig:
    """Event-SAE (arXiv 2605.17204; its public code, which trains by dictionary_learning): BatchTopK on tokens.

    As many features as channels for π0.5 (10,000 steps), eight times as many for OpenVLA (15,000 steps:
    `n_features=8 * d_model`).
    """
    training = Training(
        steps=steps, batch_size=40_000, rate=1e-4, seed=0, warmup=min(1000, steps // 2), decay_from=steps * 4 // 5,
        clip=1.0, loss="sum", aux_k=d_model // 2, aux_weight=1 / 32, dead_after=10_000_000,
    )  # fmt: skip
    return SAEConfig(
        model=model, site=site, d_model=d_model, n_features=d_model, architecture="batch_topk", k=min(64, d_model),
        normalisation="mean_square", training=training,
    )  # fmt: skip


def hooked(model: str, site: str, d_model: int, steps: int) -> SAEConfig:
    """Ours: BatchTopK with ReLU, so that edits need no more of a dictionary than the features they change; AuxK,
    decoder rows of length 1, tokens over their mean length. k is an eighth of the width and at most 64."""
    m, batch_size = 8 * d_model, 4096
    training = Training(
        steps=steps, batch_size=batch_size, rate=_RATE / sqrt(m / _RATE_FEATURES), seed=0, warmup=steps // 20,
        decay_from=steps * 4 // 5, clip=1.0, aux_k=max(1, d_model // 2), dead_after=batch_size * max(20, steps // 20),
    )  # fmt: skip
    return SAEConfig(
        model=model, site=site, d_model=d_model, n_features=m, architecture="batch_topk",
        k=max(1, min(64, d_model // 8)), normalisation="mean_norm", training=training,
    )  # fmt: skip


# name -> (what makes it, steps that were published or, of ours, that we recommend)
PRESETS: dict[str, tuple[Callable[[str, str, int, int], SAEConfig], int]] = {
    "hooked": (hooked, 10_000),
    "atlas": (atlas, 12_200),
    "atlas-temporal": (atlas_temporal, 12_200),
    "drvla": (drvla, 10_000),
    "event": (event, 10_000),
}


def preset(name: str, model: str, site: str, d_model: int, steps: int | None = None, **changes: Any) -> SAEConfig:
    """A preset's config for a site. steps: None for the preset's own; changes: as `SAEConfig.changed` takes them.

    Raises ValueError for an unknown preset, and for changes that do not go together; TypeError for unknown ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    make, own = PRESETS[name]
    config = make(model, site, d_model, own if steps is None else steps)
    return config.changed(**changes) if changes else config


def nested_prefixes(n_features: int) -> tuple[int, ...]:
    """The numbers of features that a matryoshka's parts have, in the published proportions."""
    return tuple(dict.fromkeys(max(1, n_features * part // 32) for part in _PREFIXES))
