"""Pre- and postprocessing: what observations may look like, what is refused, and what the checkpoint decides."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from public_checkpoints import Golden, make_observation
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_vla import HookedVLA, Observation
from hooked_vla.policy import Normalizer, resize_with_pad

TOP, STATE = "observation.images.top", "observation.state"
TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


def test_one_observation_may_come_as_a_robot_gives_it(tiny_model: HookedVLA, noise: Tensor) -> None:
    batch = make_observation()
    single = Observation(
        {name: image[0].numpy() for name, image in batch.images.items()}, batch.state[0].numpy(), batch.instruction[0]
    )
    floats = Observation(
        {name: image[0].permute(2, 0, 1) / 255 for name, image in batch.images.items()},
        batch.state[0],
        batch.instruction[0],
    )
    chunk = tiny_model.predict_action_chunk(single, noise[:1])
    assert chunk.shape == (1, 8, 4)
    assert torch.equal(chunk, tiny_model.predict_action_chunk(floats, noise[:1]))
    torch.testing.assert_close(chunk, tiny_model.predict_action_chunk(batch, noise)[:1], rtol=1e-5, atol=1e-5)


def test_a_raw_lerobot_batch_is_an_observation(tiny_model: HookedVLA, noise: Tensor) -> None:
    obs = make_observation()
    raw = {f"observation.images.{name}": image.permute(0, 3, 1, 2) / 255 for name, image in obs.images.items()}
    raw |= {STATE: obs.state, "task": obs.instruction}
    assert torch.equal(tiny_model.predict_action_chunk(raw, noise), tiny_model.predict_action_chunk(obs, noise))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.pop(TOP), KeyError, r"missing cameras \['top'\]: expected \['observation.images.top'\]"),
        (lambda b: b.update({TOP: (b[TOP] * 255).to(torch.uint8)}), TypeError, r"floats in 0\.\.1, got torch.uint8"),
        (lambda b: b.update({TOP: b[TOP] * 255}), ValueError, r"'top': images must be in 0\.\.1, got .*\.\.2"),
        (lambda b: b.update({TOP: b[TOP] - 0.5}), ValueError, r"'top': images must be in 0\.\.1, got -0"),
        (lambda b: b.update({TOP: b[TOP][:, :1]}), ValueError, r"'top': .*\[2, 3, height, width\], got \[2, 1"),
        (lambda b: b.update({TOP: b[TOP].permute(0, 2, 3, 1)}), ValueError, r"'top'.*got \[2, 64, 64, 3\]"),
        (lambda b: b.update({TOP: b[TOP][:1]}), ValueError, r"'top'.*\[2, 3, height, width\], got \[1"),
        (lambda b: b[TOP].__setitem__((0, 0, 0, 0), torch.nan), ValueError, r"'top': images have NaN"),
        (lambda b: b.pop(STATE), KeyError, r"no 'observation.state'"),
        (lambda b: b.update({STATE: b[STATE][:, :5]}), ValueError, r"state must be \[batch, 6\], got \[2, 5\]"),
        (lambda b: b.update({STATE: b[STATE].long()}), TypeError, r"observation.state must be floating point"),
        (lambda b: b[STATE].__setitem__((1, 2), torch.inf), ValueError, r"observation.state has NaN or infinite"),
        (lambda b: b.update({k: v[:0] for k, v in b.items()}), ValueError, r"empty batch"),
        (lambda b: b.pop(MASK), KeyError, r"no 'observation.language.attention_mask'"),
        (lambda b: b.update({MASK: b[MASK][:, :3]}), ValueError, r"mask of the same shape; got .* mask \[2, 3\]"),
        (lambda b: b.update({TOKENS: b[TOKENS] + 1000}), ValueError, r"must be ids in 0\.\.127"),
        (lambda b: b.update({TOKENS: b[TOKENS].float()}), ValueError, r"must be integers \[2, text\]"),
    ],
)  # fmt: skip
def test_bad_batches_name_the_entry_and_what_was_expected(
    change, error, message, golden: Golden, golden_model: HookedVLA
) -> None:
    batch = {key: value.clone() for key, value in golden.batch.items()}
    change(batch)
    with pytest.raises(error, match=message):
        golden_model.predict_action_chunk(batch, golden.noise)


def test_bad_observations(tiny_model: HookedVLA) -> None:
    obs = make_observation()
    for broken, error, message in (
        (replace(obs, instruction="x" * 80), ValueError, r"instruction of 81 tokens, but the model takes 64: 'xxx"),
        (replace(obs, instruction=["only one"]), ValueError, r"'task' must be a string or 2 strings"),
        (replace(obs, images={"agent": obs.images["agent"]}), KeyError, r"missing cameras \['wrist'\]"),
        (replace(obs, state=np.full((2, 4), np.nan)), ValueError, r"observation.state has NaN"),
        (
            replace(obs, images={**obs.images, "wrist": obs.images["wrist"][:, None]}),
            ValueError,
            r"'wrist': uint8 images",
        ),
    ):
        with pytest.raises(error, match=message):
            tiny_model.predict_action_chunk(broken)
    batch = {f"observation.images.{name}": image.permute(0, 3, 1, 2) / 255 for name, image in obs.images.items()}
    with pytest.raises(KeyError, match=r"neither 'task' nor 'observation.language.tokens'"):
        tiny_model.predict_action_chunk(batch | {STATE: obs.state})


def test_noise_is_checked_and_given_draws_are_used_up(tiny_model: HookedVLA, noise: Tensor) -> None:
    obs = make_observation()
    with pytest.raises(ValueError, match=r"noise must be \[2, 8, 8\] \(draw 0\), got \[2, 8, 4\]"):
        tiny_model.predict_action_chunk(obs, noise[..., :4])
    with pytest.raises(ValueError, match=r"noise has 2 draws, but the model used 1"):
        tiny_model.predict_action_chunk(obs, [noise, noise])
    with pytest.raises(ValueError, match=r"noise has 0 draws, but the model needs more"):
        tiny_model.predict_action_chunk(obs, [])
    torch.manual_seed(0)
    first = tiny_model.predict_action_chunk(obs)
    torch.manual_seed(0)
    assert torch.equal(tiny_model.predict_action_chunk(obs), first)
    assert not torch.equal(tiny_model.predict_action_chunk(obs), first)


@pytest.mark.parametrize("mode", ["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
def test_normalisation_round_trips_and_has_its_defining_values(mode: str) -> None:
    names = ("mean", "std", "min", "max", "q01", "q99", "q10", "q90")
    stats = {name: torch.tensor([0.5 + i, 2.0 + i]) for i, name in enumerate(names)}
    normalizer = Normalizer({"x": mode}, {"x": stats})
    value = torch.tensor([[0.3, -1.0], [4.0, 2.0]])
    torch.testing.assert_close(normalizer.inverse("x", normalizer("x", value)), value, rtol=1e-5, atol=1e-5)
    low, high = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"),
                 "QUANTILE10": ("q10", "q90")}.get(mode, (None, None))  # fmt: skip
    if mode == "MEAN_STD":
        torch.testing.assert_close(normalizer("x", stats[low] + stats[high]), torch.ones(2))
    elif low is not None:
        torch.testing.assert_close(normalizer("x", stats[low]), -torch.ones(2))
        torch.testing.assert_close(normalizer("x", stats[high]), torch.ones(2))
    assert torch.equal(normalizer("unknown", value), value)
    with pytest.raises(ValueError, match="unknown normalisation 'ROBUST'"):
        Normalizer({"x": "ROBUST"}, {"x": stats})("x", value)


def test_statistics_of_processor_files_reach_raw_observations_only(golden: Golden, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(golden.folder, folder)
    stats = {f"{STATE}.mean": torch.full((6,), 2.0), f"{STATE}.std": torch.full((6,), 4.0),
             "action.mean": torch.full((6,), 1.0), "action.std": torch.full((6,), 3.0)}  # fmt: skip
    save_file(stats, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    modes = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    step = {"registry_name": "normalizer_processor", "config": {"eps": 0.0, "norm_map": modes},
            "state_file": "policy_preprocessor_step_5_normalizer_processor.safetensors"}  # fmt: skip
    rename = {"registry_name": "rename_observations_processor",
              "config": {"rename_map": {"observation.images.front": "observation.images.top"}}}  # fmt: skip
    text = {"registry_name": "tokenizer_processor", "config": {"max_length": 5, "padding": "longest"}}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": [rename, text, step]}))
    characters = {chr(i): i for i in range(128)}
    words = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(models.BPE(characters, [])), pad_token="~")
    words.save_pretrained(folder)
    model = HookedVLA.from_pretrained(folder)
    images = {name: golden.batch[f"observation.images.{name}"] for name in ("top", "wrist")}
    ids = torch.tensor([[ord(letter) for letter in "go\n"]] * 2)
    raw = Observation(images, golden.batch[STATE] * 4 + 2, "go")
    ready = golden.batch | {TOKENS: ids, MASK: torch.ones_like(ids, dtype=torch.bool)}
    normalized = model.predict_action_chunk(ready, golden.noise)
    actions = model(raw, golden.noise)
    torch.testing.assert_close(actions.normalized, normalized, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actions.chunk, actions.normalized * 3 + 1)
    with pytest.raises(ValueError, match=r"tokenizer made id 13\d of .*, but the model knows 128 ids"):
        characters["é"] = 130
        other = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(models.BPE(characters, [])), pad_token="~")
        model.processor.tokenizer._tokenizer = other
        model(replace(raw, instruction="é"), golden.noise)
    renamed = {f"observation.images.{new}": images[old] for new, old in (("front", "top"), ("wrist", "wrist"))}
    renamed |= {STATE: raw.state, "task": "go"}
    assert torch.equal(model(renamed, golden.noise).chunk, actions.chunk)
    with pytest.raises(ValueError, match="instruction of 8 tokens, but the model takes 5"):
        model(replace(raw, instruction="go left"), golden.noise)
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(HookedVLA.from_pretrained(again)(raw, golden.noise).chunk, model(raw, golden.noise).chunk)


def test_damaged_processor_files_are_named(golden: Golden, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(golden.folder, folder)
    step = {"registry_name": "normalizer_processor", "config": {}, "state_file": "policy_stats.safetensors"}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    with pytest.raises(ValueError, match="policy_preprocessor.json names 'policy_stats.safetensors', which is not"):
        HookedVLA.from_pretrained(folder)
    (folder / "policy_stats.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="policy_stats.safetensors is truncated"):
        HookedVLA.from_pretrained(folder)


def test_resizing_keeps_the_aspect_and_pads_left_and_top() -> None:
    image = torch.ones(1, 3, 40, 80)
    resized = resize_with_pad(image, width=64, height=48)
    assert resized.shape == (1, 3, 48, 64)
    assert (resized[:, :, :16] == 0).all() and (resized[:, :, 16:] == 1).all()
    tall = resize_with_pad(torch.ones(1, 3, 80, 40), width=64, height=64)
    assert (tall[..., :32] == 0).all() and (tall[..., 32:] == 1).all()
    assert resize_with_pad(image, width=80, height=40) is image


def test_a_missing_tokenizer_says_where_it_was_looked_for(golden: Golden, golden_model: HookedVLA) -> None:
    images = {name: golden.batch[f"observation.images.{name}"] for name in ("top", "wrist")}
    with pytest.raises(OSError, match=r"no tokenizer in .*; put its files beside config.json, or pass token ids"):
        golden_model.predict_action_chunk(Observation(images, golden.batch[STATE], "go"))
