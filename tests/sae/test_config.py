"""Configs: JSON and back, what does not go together, presets' published figures."""

from itertools import pairwise
from typing import Any

import pytest
from toy_saes import SITE, settings

from hooked_vla.sae.config import ARCHITECTURES, SAEConfig, Training
from hooked_vla.sae.presets import PRESETS, nested_prefixes, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name: str) -> None:
    config = preset(name, "model", SITE, 720)
    assert SAEConfig.from_json(config.to_json()) == config


def test_json_keeps_what_others_trained_and_prefixes() -> None:
    config = settings("matryoshka", prefixes=(4, 64))
    assert config.prefixes == (4, 64) and SAEConfig.from_json(config.to_json()) == config
    foreign = config.changed(training=None)
    assert SAEConfig.from_json(foreign.to_json()) == foreign
    with pytest.raises(ValueError, match="how it was trained is not known"):
        _ = foreign.schedule


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[1]", 'an object with "training"'),
        (settings("topk").to_json().replace('"k"', '"kk"'), r"unknown entries \['kk'\]"),
        (settings("topk").to_json().replace('"steps"', '"stops"'), r"unknown entries \['stops'\]"),
        ('{"training": null, "site": "s"}', "incomplete"),
    ],
)
def test_damaged_json_is_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SAEConfig.from_json(text)


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("topk", {"k": 65}, r"k must be in 1\.\.64, the number of features, got 65"),
        ("topk", {"k": 0}, r"k must be in 1\.\.64"),
        ("topk", {"k": None}, "topk needs k"),
        ("relu", {"k": 3}, "relu has no k"),
        ("topk", {"normalisation": "whitening"}, "normalisation must be one of none, zscore"),
        ("other", {}, "architecture must be one of relu, topk"),
        ("topk", {"pooling": "max"}, "pooling must be one of token, mean"),
        ("transcoder", {}, "needs both"),
        ("topk", {"output_site": "s", "d_output": 4}, "are a transcoder's"),
        ("transcoder", {"output_site": "s", "d_output": 4}, "subtract_decoder_bias=False"),
        ("matryoshka", {}, "prefixes are matryoshka's"),
        ("matryoshka", {"prefixes": (8, 8, 64)}, "must ascend"),
        ("matryoshka", {"prefixes": (8, 32)}, "must ascend from 1 or more to 64"),
        ("batch_topk", {"relu": False}, "relu=False goes with topk"),
        ("gated", {"subtract_decoder_bias": False}, "gated needs subtract_decoder_bias"),
        ("jumprelu", {"encoder_bias": False}, "needs encoder_bias"),
        ("batch_topk", {"normalisation": "token_norm"}, "token_norm goes with topk"),
        ("topk", {"normalisation": "token_norm", "decoder_bias": False}, "token_norm needs decoder_bias"),
        ("topk", {"steps": 0}, "steps must be at least 1"),
        ("topk", {"rate": 0.0}, "rate must be positive"),
        ("topk", {"loss": "l1"}, "loss must be one of mse, sum, fvu"),
        ("topk", {"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ("topk", {"clip": 0.0}, "clip must be positive"),
        ("topk", {"initial_bias": "median"}, "initial_bias must be one of"),
    ],
)
def test_what_does_not_go_together_is_named(architecture: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        settings(architecture, **changes)


def test_unknown_settings_and_presets_are_named() -> None:
    with pytest.raises(TypeError, match=r"unknown settings \['stops'\]"):
        settings("topk", stops=3)
    with pytest.raises(ValueError, match="unknown preset 'mine'; presets: hooked, atlas"):
        preset("mine", "model", SITE, 8)


def test_every_architecture_is_told_of() -> None:
    assert set(ARCHITECTURES) == {"relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "transcoder",
                                  "temporal"}  # fmt: skip


def test_published_figures() -> None:
    atlas, drvla, event = (preset(name, "model", "vlm.blocks.5.hook_resid_post", 1024) for name in
                           ("atlas", "drvla", "event"))  # fmt: skip
    assert (atlas.n_features, atlas.k, atlas.relu, atlas.normalisation) == (8192, 64, False, "zscore")
    assert (atlas.schedule.rate, atlas.schedule.batch_size, atlas.unit_decoder) == (3e-4, 4096, False)
    assert (drvla.n_features, drvla.k, drvla.normalisation, drvla.pooling) == (1024, 100, "token_norm", "mean")
    assert (drvla.schedule.rate, drvla.schedule.eps, drvla.schedule.aux_k) == (1e-4, 6.25e-10, 512)
    assert drvla.schedule.dead_after == 500 * 4096 and not drvla.encoder_bias
    assert preset("drvla", "model", "expert.blocks.5.hook_resid_post", 1024).k == 64
    assert (event.n_features, event.k, event.architecture) == (1024, 64, "batch_topk")
    assert (event.schedule.batch_size, event.schedule.steps, event.schedule.rate) == (40_000, 10_000, 1e-4)


def test_learning_rate_rises_and_falls() -> None:
    schedule = Training(steps=100, batch_size=1, rate=1.0, seed=0, warmup=10, decay_from=80)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:80] == [1.0] * 71
    assert all(a > b > 0 for a, b in pairwise(factors[80:]))
    assert Training(steps=3, batch_size=1, rate=1.0, seed=0).factor(2) == 1.0
    growing = Training(steps=9, batch_size=1, rate=1.0, seed=0, penalty=2.0, penalty_warmup=4)
    assert [growing.penalty_at(step) for step in (0, 3, 8)] == [0.5, 2.0, 2.0]


def test_prefixes_have_the_published_proportions() -> None:
    assert nested_prefixes(65_536) == (2048, 6144, 14_336, 30_720, 65_536)
    assert nested_prefixes(3)[-1] == 3
