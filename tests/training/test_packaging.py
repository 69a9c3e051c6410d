"""GR00T, OpenVLA and OFT at the tabletop's size: their folders, prompts and statistics, and that training works."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_close
from transformers import AutoTokenizer

from hooked_vla import HookedVLA, Observation
from hooked_vla.training.batches import Batch, Prompting, encode
from hooked_vla.training.dataset import Moments, gather
from hooked_vla.training.demonstrations import Recorder
from hooked_vla.training.language import lay_out, vocabulary
from hooked_vla.training.objective import Objective
from hooked_vla.training.packaging import DATASET, new_checkpoint
from hooked_vla.training.recipes import RECIPES, Recipe
from hooked_vla.training.tower import see
from hooked_vla.training.trainer import Schedule, train

POLICIES = ["groot-tabletop", "openvla-tabletop", "oft-tabletop"]
TEXTS = ["put the red block on the orange pad", "carry the blue block to the cyan pad high above the table", ""]
# no action is read from OFT's scores of words
UNTRAINED = {"oft-tabletop": {"net.vlm.unembed.weight"}}


@pytest.fixture(scope="module")
def moments() -> Moments:
    source = Recorder({"goal": 1.0}, ("top", "wrist"), 96, chunk=8, seed=0, keep=0.8)
    return gather(source.episodes(1), source.names, 48, lambda n: None)


@pytest.fixture(scope="module", params=POLICIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def recipe(name: str) -> Recipe:
    return RECIPES[name]


@pytest.fixture(scope="module")
def values(moments: Moments) -> dict[str, np.ndarray]:
    return {"observation.state": moments.state, "action": moments.chunk}


@pytest.fixture(scope="module")
def folder(recipe: Recipe, values: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    new_checkpoint(recipe.spec, folder, vocabulary(recipe.words), values, seed=0)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedVLA:
    """Not to be changed."""
    return HookedVLA.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(model: HookedVLA, moments: Moments) -> Batch:
    chunk = model.predict_action_chunk(observation(moments)).shape[1]
    return encode(model, replace(moments, chunk=moments.chunk[:, :chunk]), Prompting(), seed=0)


def observation(moments: Moments, n: int = 3) -> Observation:
    images = {camera: moments.images[:n, i] for i, camera in enumerate(("top", "wrist"))}
    return Observation(images, moments.state[:n], TEXTS[:n])


def test_saving_and_loading_keep_everything(model: HookedVLA, folder: Path, moments: Moments, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = ({path.name for path in each.iterdir()} for each in (folder, tmp_path))
    assert before == after
    for file in folder.glob("*.json"):
        assert json.loads(file.read_text()) == json.loads((tmp_path / file.name).read_text()), file.name
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec == model.spec
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    noise = torch.randn(3, 8, 4) if model.spec.family == "groot" else None
    expected = model.predict_action_chunk(observation(moments), noise)
    assert torch.equal(again.predict_action_chunk(observation(moments), noise), expected)


def test_a_folder_is_the_spec(model: HookedVLA, recipe: Recipe) -> None:
    assert model.spec == HookedVLA.from_spec(recipe.spec, "tabletop").spec
    assert model.load_report is not None and not model.load_report.dropped


def test_tokenizers_are_of_a_class_that_transformers_4_and_5_know(folder: Path) -> None:
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("put it down\n")["input_ids"]) == ["put", "it", "down", "\n"]


def said(model: HookedVLA, moments: Moments) -> list[list[str]]:
    """The tokens of each prompt, those of images left out."""
    inputs: Any = model.prepare(observation(moments))
    tokenizer = model.processor.tokenizer.load()
    pairs = zip(inputs.tokens, inputs.token_mask, strict=True)
    rows = [tokenizer.convert_ids_to_tokens(row[mask]) for row, mask in pairs]
    return [[token for token in row if token != "<IMG_CONTEXT>"] for row in rows]


def test_prompts_are_the_familys_own_one_token_a_word(model: HookedVLA, name: str, moments: Moments) -> None:
    first, second, empty = said(model, moments)
    assert not any("<unk>" in row for row in (first, second, empty))
    if name == "groot-tabletop":
        told = "you are a helpful assistant"
        system = ["<|im_start|>", "system", "\n", *told.split(), ".", "<|im_end|>", "\n", "<|im_start|>", "user", "\n"]
        images = ["<image 1>", "<img>", "</img>", "<image 2>", "<img>", "</img>"]
        end = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
        texts = (TEXTS[0].split(), TEXTS[1].split(), ["perform", "the", "task", "."])
        expected = [[*system, *images, "[", "'", *text, "'", "]", *end] for text in texts]
    else:
        asked = "what action should the robot take to"
        expected = [["<s>", "in", ":", *asked.split(), *text.split(), "?", "\n", "out", ":", "▁"] for text in TEXTS]
    assert [first, second, empty] == expected


def test_an_instruction_with_an_apostrophe_is_known(recipe: Recipe, model: HookedVLA, moments: Moments) -> None:
    inputs: Any = model.prepare(replace(observation(moments), instruction="don't move"))
    tokenizer = model.processor.tokenizer.load()
    assert not (inputs.tokens == tokenizer.unk_token_id).any()


def test_action_tokens_are_named(values: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = new_checkpoint("openvla", tmp_path, vocabulary(), values, seed=0)
    bins = torch.tensor([[[-1.0, 0.0, 0.999, 1.0]]])
    ids = model.net.get_submodule("head").encode(bins)[0]  # type: ignore[operator]
    names = model.processor.tokenizer.load().convert_ids_to_tokens(ids)
    assert names == ["<action 0>", "<action 127>", "<action 254>", "<action 255>"]


def test_statistics_of_the_demonstrations_normalise(model: HookedVLA, name: str, moments: Moments) -> None:
    chunk = torch.from_numpy(moments.chunk)
    normalized = model.processor.normalizer("action", chunk)
    assert normalized.min() >= -1 and normalized.max() <= 1 and normalized.std() > 0.2
    inputs: Any = model.prepare(observation(moments))
    if name == "groot-tabletop":
        assert_close(model.processor.normalizer.inverse("action", normalized), chunk)
        expected = np.ptp(moments.state, axis=0)
        assert_close(inputs.state, torch.from_numpy(2 * (moments.state[:3] - moments.state.min(0)) / expected - 1))
        return
    low, high = (np.quantile(moments.chunk.reshape(-1, 4).astype(float), q, axis=0) for q in (0.01, 0.99))
    # the suction is not scaled, and not cut off
    low[3], high[3] = -1, 1
    assert_close(model.processor.normalizer.inverse("action", normalized), chunk.clamp(*map(torch.tensor, (low, high))))
    assert torch.equal(normalized[..., 3], chunk[..., 3])
    assert inputs.state.shape == (3, 4 if name == "oft-tabletop" else 0) and inputs.state.abs().le(1).all()
    named = model.predict_action_chunk(observation(moments), unnorm_key=DATASET)
    assert torch.equal(named, model.predict_action_chunk(observation(moments)))


def test_rows_do_not_depend_on_their_batch(model: HookedVLA, name: str, moments: Moments) -> None:
    """Neither on who is in it, nor on how long the others' instructions are."""
    together: Any = model.prepare(observation(moments))
    noise = torch.randn(3, 8, 4)
    acted = model.sample_actions(together, noise if name == "groot-tabletop" else None)
    for row in range(3):
        images = {camera: moments.images[row, i] for i, camera in enumerate(("top", "wrist"))}
        alone: Any = model.prepare(Observation(images, moments.state[row], TEXTS[row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.token_mask[0], together.token_mask[row])
        own = model.sample_actions(alone, noise[row : row + 1] if name == "groot-tabletop" else None)
        assert_close(own[0], acted[row])


def test_gradients_reach_everything_and_training_lowers_the_loss(
    folder: Path, batch: Batch, name: str, recipe: Recipe
) -> None:
    model = HookedVLA.from_pretrained(folder)
    model.net.get_submodule("vision").requires_grad_(False)
    for key, factor in recipe.scaled.items():
        model.net.get_parameter(key).data.mul_(factor)
    torch.manual_seed(0)
    objective = Objective(model, 1, recipe.readout)
    trained = {key: each for key, each in objective.named_parameters() if each.requires_grad}

    def losses() -> tuple[float, float]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            total, loss, error = objective(batch.inputs, batch.actions, batch.goals)
        assert recipe.readout is not None
        assert total.item() == pytest.approx(loss.item() + recipe.readout.weight * error.item(), rel=1e-5)
        return loss.item(), error.item()

    before = losses()
    optimizer = torch.optim.AdamW(trained.values(), 3e-3)
    for step in range(16):
        rows = batch.rows([(8 * step + i) % len(batch) for i in range(8)])
        total, *_ = objective(rows.inputs, rows.actions, rows.goals)
        assert total.isfinite()
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            unread = {key for key, each in trained.items() if each.grad is None or not each.grad.any()}
            assert unread == UNTRAINED.get(name, set())
        optimizer.step()
    after = losses()
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1], (before, after)
    assert all(parameter.grad is None for parameter in model.net.get_submodule("vision").parameters())


def test_what_training_reads_are_the_goal_cameras_tokens(model: HookedVLA, batch: Batch, recipe: Recipe) -> None:
    """In each row at its own places, however long its instruction is."""
    objective = Objective(model, 1, recipe.readout)
    inputs: Any = batch.rows([0, 1, 2]).inputs
    readout = recipe.readout
    assert readout is not None
    segments = model.segments(inputs)[readout.site.partition(".")[0]]
    length = segments.labels.shape[1]
    place = torch.arange(length).expand(3, length)[..., None].float()
    if readout.prompt_grid:
        # images stand between the first token, which begins the text, and the words; padding behind them
        words = [range(33, 32 + n) for n in inputs.token_mask.sum(1).tolist()]
        mean, last = objective._prompt(segments, place)
        torch.testing.assert_close(mean.flatten(), torch.tensor([sum(each) / len(each) for each in words]))
        assert last.flatten().tolist() == [each[-1] for each in words]
        return
    spec: Any = model.spec
    first = (inputs.tokens == spec.image_token).long().argmax(1) if hasattr(inputs, "grid") else torch.ones(3)
    assert torch.equal(objective._places(segments, place)[..., 0], first[:, None] + torch.arange(16))


def test_the_tower_sees_patches_in_their_order(model: HookedVLA, moments: Moments) -> None:
    images = moments.images[:1].copy()
    before = see(model, images)
    # the third patch of the second row, in both cameras
    images[:, :, 24:48, 48:72] = 255 - images[:, :, 24:48, 48:72]
    after = see(model, images)
    assert before.shape == (2, 16, model.net.d_features)
    assert (after - before).norm(dim=-1).argmax(1).tolist() == [6, 6]


@torch.no_grad()
def test_features_of_two_towers_stand_side_by_side(
    values: dict[str, np.ndarray], moments: Moments, tmp_path: Path
) -> None:
    model = new_checkpoint("openvla_oft", tmp_path, vocabulary(), values, seed=0)
    inputs: Any = model.prepare(observation(moments))
    _, cache = model.run_with_cache(inputs, "vision.*.blocks.2.hook_resid_post")
    dino, siglip = (cache[f"vision.{tower}.blocks.2.hook_resid_post"] for tower in ("dino", "siglip"))
    # dino's class token and registers are left out
    expected = torch.cat([dino[:, 3:], siglip], dim=-1).unflatten(0, (3, 2))
    assert torch.equal(model.net.vision_features(inputs), expected)
    kept = replace(inputs, features=expected, images=None)
    assert torch.equal(model.sample_actions(kept), model.sample_actions(inputs))


def test_towers_that_can_be_shared_are_alike() -> None:
    def shapes(spec: str) -> dict[str, torch.Size]:
        net = HookedVLA.from_spec(spec, "tabletop").net
        return {name: each.shape for name, each in net.get_submodule("vision").named_parameters()}

    assert shapes("groot_n15") == shapes("pi05")
    assert shapes("openvla") == shapes("openvla_oft")


def test_a_killed_run_of_tied_weights_goes_on(values: dict[str, np.ndarray], moments: Moments, tmp_path: Path) -> None:
    """OpenVLA generates with the weights that it reads with."""
    recipe = RECIPES["openvla-tabletop"]
    model = new_checkpoint(recipe.spec, tmp_path / "new", vocabulary(), values, seed=0)
    data = encode(model, replace(moments, chunk=moments.chunk[:, :1]), Prompting(), seed=0)
    start = {key: value.clone() for key, value in model.net.state_dict().items()}
    schedule = Schedule(steps=2, batch=4, n_draws=1, warmup=1)

    def kill(_: HookedVLA) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, data, schedule, recipe.readout, tmp_path / "cut", 0, save_every=1, evaluate=(1, kill))
    model.net.load_state_dict(start)
    train(model, data, schedule, recipe.readout, tmp_path / "cut", 0)
    cut = {key: value.clone() for key, value in model.net.state_dict().items()}
    model.net.load_state_dict(start)
    train(model, data, schedule, recipe.readout, tmp_path / "whole", 0)
    assert all(torch.equal(value, cut[key]) for key, value in model.net.state_dict().items())
    assert torch.equal(cut["decode.ln_final.weight"], cut["vlm.ln_final.weight"])
    assert not torch.equal(cut["vlm.embed.weight"], start["vlm.embed.weight"])


def test_words_that_do_not_fit_are_refused(values: dict[str, np.ndarray], tmp_path: Path) -> None:
    too_many = [*vocabulary(), *(f"word{i}" for i in range(200))]
    for spec in ("groot_n15", "openvla"):
        with pytest.raises(ValueError, match="do not fit a vocabulary"):
            new_checkpoint(spec, tmp_path, too_many, values, seed=0)


def test_special_words_must_have_the_ids_of_the_spec(values: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"openvla: the spec says other ids.*'<s>': \(189, 3\)"):
        new_checkpoint("openvla", tmp_path, [*vocabulary()[:3], "<s>", *vocabulary()[3:]], values, seed=0)


def test_a_vocabulary_ends_with_what_is_wanted_last() -> None:
    assert lay_out(["a", "b", "a"], ["<x>", "<y>"], 6) == ["a", "b", "<unused 0>", "<unused 1>", "<x>", "<y>"]
