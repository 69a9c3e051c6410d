import csv
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hooked_vla import HookedVLA, Observation, get_spec, list_models
from hooked_vla.cli import app
from hooked_vla.training import demonstrations
from hooked_vla.training.batches import Batch, Prompting, concatenate, encode, shuffled
from hooked_vla.training.dataset import gather
from hooked_vla.training.demonstrations import Policy, Recorder
from hooked_vla.training.language import vocabulary
from hooked_vla.training.objective import Objective, Readout
from hooked_vla.training.packaging import new_checkpoint, statistics
from hooked_vla.training.pipeline import Workshop, claim
from hooked_vla.training.recipes import RECIPES
from hooked_vla.training.tower import Seen, patch_centres, place_loss, place_targets, see
from hooked_vla.training.trainer import Schedule, train
from hooked_vla.weights import SHIPPED, shipped_policies

READOUT = Readout("vlm.blocks.3.hook_resid_pre", 0.5)


@pytest.fixture(scope="module")
def moments():
    source = Recorder({"goal": 1.0}, ("top", "wrist"), 96, chunk=8, seed=0, keep=0.3)
    return gather(source.episodes(1), source.names, 24, lambda n: None)


@pytest.fixture
def model(moments, tmp_path) -> HookedVLA:
    values = {"observation.state": moments.state, "action": moments.chunk}
    return new_checkpoint("smolvla", tmp_path / "new", vocabulary(), values, seed=0)


@pytest.fixture
def batch(model, moments) -> Batch:
    return encode(model, moments, Prompting(), seed=0)


def test_a_new_checkpoint_is_a_whole_policy(model, moments, tmp_path):
    assert model.processor.tokenizer(["put", "the", "red", "block", "on", "the", "orange", "pad"])[0].shape[1] == 16
    whole = {name: value for name, value in statistics(moments.state).items()}
    normalized = model.processor.normalizer("observation.state", torch.from_numpy(moments.state))
    assert normalized.mean(0).abs().max() < 1e-3 and set(whole) == {"mean", "std", "min", "max", "q01", "q99"}
    model.save_pretrained(tmp_path / "again")
    again = HookedVLA.from_pretrained(tmp_path / "again")
    obs = policy_observation(moments)
    noise = torch.randn(2, 8, 4)
    assert torch.equal(again.predict_action_chunk(obs, noise), model.predict_action_chunk(obs, noise))


def policy_observation(moments):
    images = {camera: moments.images[:2, i] for i, camera in enumerate(("top", "wrist"))}
    return Observation(images, moments.state[:2], ["put the red block on the orange pad"] * 2)


def test_cached_features_give_the_loss_of_the_images(model, moments, batch):
    prompts = Prompting(paraphrased=0.0, dropped=0.0)
    kept = encode(model, moments, prompts, seed=0).rows([0, 1])
    texts = [f"put the {b} block on the {p} pad" for b, p in (moments.tasks[t][1].split("-") for t in moments.task[:2])]
    images = {camera: moments.images[:2, i] for i, camera in enumerate(("top", "wrist"))}
    inputs = model.prepare(Observation(images, moments.state[:2], texts))
    noise = [torch.randn(2, 8, 4), torch.rand(2)]
    seen = model.training_loss(inputs, kept.actions, noise=noise)
    # features are kept in half precision
    torch.testing.assert_close(model.training_loss(kept.inputs, kept.actions, noise=noise), seen, rtol=2e-3, atol=2e-3)


def test_features_are_made_once_and_read_back_as_they_were(model, moments, tmp_path, monkeypatch):
    path = tmp_path / "run" / "features.safetensors"
    made = encode(model, moments, Prompting(), 0, path)
    plain = encode(model, moments, Prompting(), 0)
    monkeypatch.setattr(type(model.net), "vision_features", None)
    again = encode(model, moments, Prompting(), 0, path)
    for batch in (made, again):
        assert torch.equal(batch.actions, plain.actions) and torch.equal(batch.goals, plain.goals)
        for name, value in vars(plain.inputs).items():
            kept = getattr(batch.inputs, name)
            assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value, name
    with pytest.raises(TypeError):
        encode(model, moments, Prompting(), 0, tmp_path / "run" / "other.safetensors")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    recipe, shop = RECIPES["act-tabletop"], Workshop(tmp_path / "shared", tmp_path / "act-tabletop", workers=1, seed=0)
    claim(recipe, shop)
    written = (shop.own / "recipe.json").read_bytes()
    claim(recipe, shop)
    with pytest.raises(
        ValueError, match=r"act-tabletop was begun with other settings: seed: 0 recorded, 1 now\. Go on"
    ):
        claim(recipe, replace(shop, seed=1))
    with pytest.raises(ValueError, match=r"schedule\.steps: 6000 recorded, 5 now; moments: 24000 recorded, 7 now"):
        claim(replace(recipe, moments=7, schedule=replace(recipe.schedule, steps=5)), shop)
    done = CliRunner().invoke(app, ["train", "act-tabletop", "--out", str(tmp_path), "--seed", "1"])
    assert done.exit_code == 2 and "seed: 0 recorded, 1 now" in " ".join(done.output.replace("│", " ").split())
    assert (shop.own / "recipe.json").read_bytes() == written
    assert {path.name for path in tmp_path.rglob("*")} == {"act-tabletop", "recipe.json"}


def test_a_killed_run_goes_on_as_if_it_had_not_been(model, batch, tmp_path):
    schedule = Schedule(steps=4, batch=4, n_draws=1, warmup=1)
    start = {name: value.clone() for name, value in model.net.state_dict().items()}
    train(model, batch, schedule, READOUT, tmp_path / "whole", seed=0, save_every=2)
    whole = {name: value.clone() for name, value in model.net.state_dict().items()}
    model.net.load_state_dict(start)

    class Killed(Exception):
        pass

    def kill(_: HookedVLA) -> dict[str, float]:
        raise Killed

    with pytest.raises(Killed):
        train(model, batch, schedule, READOUT, tmp_path / "cut", seed=0, save_every=2, evaluate=(3, kill))
    assert [path.name for path in (tmp_path / "cut").glob("state-*")] == ["state-2"]
    model.net.load_state_dict(start)
    train(model, batch, schedule, READOUT, tmp_path / "cut", seed=0, save_every=2)
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert any(not torch.equal(whole[name], start[name]) for name in whole if name.startswith("vlm."))
    frozen = [name for name in whole if name.startswith("vision.")]
    assert frozen and all(torch.equal(whole[name], start[name]) for name in frozen)


def test_the_log_has_every_row_once(model, batch, tmp_path):
    curve = []

    def note(_: HookedVLA) -> dict[str, float]:
        curve.append(1.0)
        return {"goal": 0.5}

    train(model, batch, Schedule(steps=2, batch=4, n_draws=1), None, tmp_path, seed=0, evaluate=(1, note))
    with (tmp_path / "curve.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "goal"], ["1", "0.5"], ["2", "0.5"]]


def test_read_out_reaches_the_language_model(model, batch):
    objective = Objective(model, 1, Readout(READOUT.site, 1.0))
    total, loss, error = objective(batch.inputs, batch.actions, batch.goals)
    assert total.item() == pytest.approx(loss.item() + error.item(), rel=1e-5)
    error_only = Objective(model, 1, None)(batch.inputs, batch.actions, batch.goals)
    assert error_only[2].item() == 0
    total.backward()
    assert model.net.get_parameter("vlm.embed.weight").grad.abs().max() > 0


def test_every_row_comes_once_before_any_comes_again(batch):
    stream = shuffled(batch, 6, seed=0)
    first = torch.cat([next(stream).goals.flatten(1) for _ in range(4)])
    assert {tuple(row) for row in first.tolist()} == {tuple(row) for row in batch.goals.flatten(1).tolist()}
    skipped = next(shuffled(batch, 6, seed=0, skip=2)).actions
    stream = shuffled(batch, 6, seed=0)
    assert torch.equal(skipped, [next(stream).actions for _ in range(3)][2])


def test_inputs_of_unequal_text_are_not_joined(model, batch):
    short = replace(batch.inputs, tokens=batch.inputs.tokens[:, :3], token_mask=batch.inputs.token_mask[:, :3])
    with pytest.raises(ValueError, match="tokens has shapes"):
        concatenate([batch.inputs, short])


def read_places(seen: Seen) -> torch.Tensor:
    """Places as the patches vote for them, weighted by how near they say to be."""
    near, offsets = seen
    side = int(near.shape[1] ** 0.5)
    votes = patch_centres(side)[:, None] + offsets / side
    return ((4 * near).softmax(dim=1)[..., None] * votes).sum(dim=1)


def test_places_are_read_back_from_what_the_tower_should_say():
    places = torch.rand(5, 8, 2)
    near, offsets = place_targets(places, side=8)
    seen = (near.float() * 40 - 20, offsets)
    assert (read_places(seen) - places).abs().max() < 1e-4
    assert place_loss(seen, places) < 1e-5 < place_loss((seen[0], offsets + 0.1), places)
    places[0, 0] = float("nan")
    assert place_loss(seen, places).isfinite()


def test_the_tower_sees_every_camera_of_every_frame(model, moments):
    features = see(model, moments.images[:3])
    assert features.shape == (6, 64, 96)


def test_a_policy_acts_in_all_rows_at_once(model, monkeypatch):
    monkeypatch.setattr(demonstrations, "MAX_STEPS", 10)
    source = Recorder({"goal": 1.0}, ("top", "wrist"), 96, chunk=8, seed=1, keep=0.5)
    rows = next(source.episodes(2, lambda n: Policy(model)))
    assert len(rows) == 2 and all(0 < len(row) < 10 for row in rows)
    assert all(moment.chunk.shape == (8, 4) for row in rows for moment in row)


def test_shipped_sizes_stay_below_eight_megabytes():
    assert RECIPES
    for recipe in RECIPES.values():
        net = HookedVLA.from_spec(recipe.spec, "tabletop").net
        assert 4 * sum(parameter.numel() for parameter in net.parameters()) < 8e6, recipe.spec


def test_only_trained_models_have_a_tabletop_size():
    for name in list_models():
        if name not in {recipe.spec for recipe in RECIPES.values()}:
            with pytest.raises(ValueError, match="sizes"):
                get_spec(name, "tabletop")


def test_statistics_do_not_blow_up_what_hardly_moves():
    assert statistics(np.zeros((10, 2), np.float32))["std"].min() == pytest.approx(1e-2)


def test_an_unknown_policy_is_refused_with_the_known_ones(tmp_path):
    done = CliRunner().invoke(app, ["train", "no-such-tabletop", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "no-such-tabletop" in done.output and "smolvla-tabletop" in done.output
    assert not any(tmp_path.iterdir())


def test_shipped_policies_are_known_by_name_and_carry_their_cards():
    assert set(shipped_policies()) <= set(RECIPES) and "pi05-tabletop" in shipped_policies()
    for name in shipped_policies():
        model = HookedVLA.from_pretrained(name)
        card = json.loads((SHIPPED / name / "card.json").read_text())
        assert card["parameters"] == sum(each.numel() for each in model.net.parameters())
        # weights may be in several files
        weights = [path for path in (SHIPPED / name).rglob("*") if path.suffix not in {".json", ".md"}]
        assert SHIPPED / name / "model.safetensors" in weights
        assert sum(path.stat().st_size for path in weights) < 8e6, name
        for rate in card["success"].values():
            assert rate["interval"][0] <= rate["success_rate"] <= rate["interval"][1]
        assert name in (SHIPPED / name / "README.md").read_text()


def test_shipped_policies_act_without_a_warning(moments, monkeypatch, caplog, recwarn):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in shipped_policies():
        HookedVLA.from_pretrained(name).predict_action_chunk(policy_observation(moments))
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert not said and not [str(each.message) for each in recwarn], (name, said)
