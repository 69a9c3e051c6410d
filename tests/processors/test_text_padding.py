"""Prompts padded to a fixed length, and statistics of OpenVLA's data sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerance import assert_close

from hooked_vla import HookedVLA, Observation
from hooked_vla.processors.openvla import DatasetNormalizer

TEXTS = ["lift", "put the red block on the tray"]


def padded(name: str, max_text: int) -> HookedVLA:
    """A tiny model that pads its prompts."""
    model = HookedVLA.from_spec(name, "tiny", seed=0)
    features = replace(model.processor.features, pad_text="max_length", max_text=max_text)
    model.processor.features = model.processor.tokenizer.features = features
    return model


def observation(model: HookedVLA, texts: list[str]) -> Observation:
    images = {c: np.full((len(texts), 32, 32, 3), 90, np.uint8) for c in model.spec.features.cameras}
    return Observation(images, np.zeros((len(texts), 4), np.float32), texts)


@pytest.mark.parametrize(("name", "max_text"), [
    ("groot_n15", 270), ("groot_n17", 270), ("openvla", 90), ("openvla_oft", 90),
])  # fmt: skip
def test_a_fixed_length_is_everyones(name: str, max_text: int) -> None:
    model = padded(name, max_text)
    both = model.prepare(observation(model, TEXTS))
    assert both.tokens.shape == both.token_mask.shape == (2, max_text)  # type: ignore[attr-defined]
    for row, text in enumerate(TEXTS):
        alone = model.prepare(observation(model, [text]))
        assert torch.equal(alone.tokens[0], both.tokens[row])  # type: ignore[attr-defined]
        assert torch.equal(alone.token_mask[0], both.token_mask[row])  # type: ignore[attr-defined]
    published = HookedVLA.from_spec(name, "tiny", seed=0).prepare(observation(model, TEXTS))
    # the published models pad to the longest: the same words, then (GR00T: before them) padding
    for row, mask in enumerate(published.token_mask):  # type: ignore[attr-defined]
        assert torch.equal(both.tokens[row][both.token_mask[row]], published.tokens[row][mask])  # type: ignore
    assert published.token_mask.any(0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "max_text"), [("groot_n15", 100), ("openvla", 60)])
def test_prompts_beyond_it_are_refused(name: str, max_text: int) -> None:
    model = padded(name, max_text)
    with pytest.raises(ValueError, match=f"prompt of .* but the model takes {max_text}"):
        model.prepare(observation(model, ["put the red block on the tray"]))


def test_the_last_id_of_a_prompt_counts() -> None:
    """OpenVLA's prompt gets one id more than its text has."""
    n_ids = int(padded("openvla", 90).prepare(observation(padded("openvla", 90), ["lift"])).token_mask.sum())  # type: ignore
    with pytest.raises(ValueError, match=f"prompt of {n_ids} tokens, but the model takes {n_ids - 1}"):
        model = padded("openvla", n_ids - 1)
        model.prepare(observation(model, ["lift"]))
    assert padded("openvla", n_ids).prepare(observation(model, ["lift"])).tokens.shape == (1, n_ids)  # type: ignore


def test_data_sets_bounds_go_to_the_ends_and_back() -> None:
    bounds = {"q01": [0.0, -1.0, 0.0], "q99": [4.0, 1.0, 1.0], "mask": [True, True, False]}
    normalizer = DatasetNormalizer({}, datasets={"own": {"action": bounds}})
    value = torch.tensor([[0.0, 0.0, 7.0], [4.0, 3.0, -7.0], [-9.0, 1.0, 0.5]])
    assert_close(normalizer("action", value), torch.tensor([[-1.0, 0.0, 7.0], [1.0, 1.0, -7.0], [-1.0, 1.0, 0.5]]))
    assert_close(normalizer.inverse("action", normalizer("action", value))[1], torch.tensor([4.0, 1.0, -7.0]))
    assert torch.equal(normalizer("observation.state", value), value)
    with pytest.raises(ValueError, match="3 dimensions, the model 2"):
        normalizer("action", value[:, :2])
    several = replace(normalizer, datasets={"a": {"action": bounds}, "b": {"action": bounds}})
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\]"):
        several("action", value)
    assert torch.equal(replace(several, chosen="b")("action", value), normalizer("action", value))
    with pytest.raises(ValueError, match=r"lack \['q99'\]"):
        replace(normalizer, datasets={"own": {"action": {"q01": [0.0] * 3}}})("action", value)
