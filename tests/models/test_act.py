"""ACT against the public implementation's recorded values, and what its wiring implies."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from public_checkpoints import Golden, make_observation, read_golden
from recipe import read_keys, write_checkpoint
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, registry
from hooked_vla.weights import KeyRules, plan_loading

_MODULES = {
    "model.encoder.layers.{}": "encoder.blocks.{}.hook_resid_post",
    "model.encoder.layers.{}.linear2": "encoder.blocks.{}.hook_mlp_out",
    "model.decoder.layers.{}": "expert.blocks.{}.hook_resid_post",
    "model.decoder.layers.{}.linear2": "expert.blocks.{}.hook_mlp_out",
    "model.action_head": "head.hook_actions",
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("act")


@pytest.fixture(scope="module")
def model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return HookedVLA.from_spec("act", "tiny").requires_grad_(False)


@pytest.fixture
def edited(golden: Golden, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the fixture's checkpoint with some of config.json and of the tensors changed."""

    def write(change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **config) -> Path:
        stored = json.loads((golden.folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stored | config))
        save_file(change(load_file(golden.folder / "model.safetensors")), tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_actions_equal_the_public_implementation(golden: Golden, model: HookedVLA) -> None:
    assert_close(model.predict_action_chunk(golden.batch), golden.actions)


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch)
    modules = [key.removeprefix("ref.") for key in golden.recorded if key.startswith("ref.")]
    assert len(modules) == 9
    for module in modules:
        hook = _MODULES[re.sub(r"layers\.\d+", "layers.{}", module)].format(*re.findall(r"layers\.(\d+)", module))
        recorded = golden.recorded[f"ref.{module}"][0]
        # the reference's transformers are sequence first
        ours = cache[hook][0] if hook.startswith("expert") else cache[hook]
        assert_close(ours, recorded if module == "model.action_head" else recorded.transpose(0, 1))


def test_bfloat16_stays_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    actions = model.predict_action_chunk(golden.batch)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


def test_published_size_has_the_published_parameters_and_keys() -> None:
    spec = registry.get_spec("act")
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 51_613_582
    parameters = {name: tensor.shape for name, tensor in net.state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), read_keys("act"), parameters)
    assert set(plan) == set(parameters)
    assert not dropped


def test_saving_keeps_every_tensor_of_the_public_file(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (golden.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = HookedVLA.from_pretrained(tmp_path)
    assert torch.equal(again.predict_action_chunk(golden.batch), model.predict_action_chunk(golden.batch))


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs = tiny.prepare(make_observation())
    both = tiny.sample_actions(inputs)
    for row in range(2):
        assert_close(tiny.sample_actions(inputs.rows([row])), both[row : row + 1])


def test_patching_all_inputs_of_a_layer_reproduces_the_source(tiny: HookedVLA) -> None:
    """A decoder layer's inputs are its residual stream and what it and later layers read of the encoder."""
    a, b = make_observation(seed=0), make_observation(seed=1)
    wanted = ["expert.blocks.1.hook_resid_pre", "expert.blocks.1.cross_attn.hook_[kv]"]
    expected, cache = tiny.run_with_cache(b, wanted)
    patched = tiny.run_with_hooks(a, [(wanted, lambda value, hook: cache[hook.name][0])])
    assert expected is not None
    assert torch.equal(patched.chunk, expected.chunk)
    assert not torch.equal(tiny(a).chunk, expected.chunk)


def test_image_tokens_are_all_that_the_image_changes(tiny: HookedVLA) -> None:
    first, second = make_observation(seed=0), make_observation(seed=1)
    swapped = replace(first, images={**first.images, "wrist": second.images["wrist"]})
    _, before = tiny.run_with_cache(first, "encoder.hook_tokens")
    _, after = tiny.run_with_cache(swapped, "encoder.hook_tokens")
    segments = tiny.segments(tiny.prepare(first))["encoder"]
    assert segments.present() == ["latent", "state", "image:agent", "image:wrist"]
    for name in segments.present():
        same = torch.equal(before["encoder.hook_tokens"].segment(name), after["encoder.hook_tokens"].segment(name))
        assert same == (name != "image:wrist"), name


def test_the_latent_is_zero_and_steers_when_edited(tiny: HookedVLA) -> None:
    obs = make_observation()
    plain, cache = tiny.run_with_cache(obs, "encoder.hook_latent")
    assert (cache["encoder.hook_latent"] == 0).all()
    steered = tiny.run_with_hooks(obs, [("encoder.hook_latent", lambda value, hook: value + 1)])
    assert plain is not None
    assert not torch.equal(steered.chunk, plain.chunk)


def test_residual_convolution_blocks_add_their_shortcut(model: HookedVLA, golden: Golden) -> None:
    _, cache = model.run_with_cache(golden.batch, "vision.*")
    for stage in range(4):
        block = f"vision.stages.{stage}.1"
        total = cache[f"vision.stages.{stage}.0.hook_resid_post"] + cache[f"{block}.hook_conv2"]
        assert_close(cache[f"{block}.hook_resid_post"], total.relu())
    # [image position channel], one row per camera image
    assert cache["vision.stages.3.1.hook_resid_post"].shape == (4, 2 * 2, 512)
    assert cache["vision.stages.0.1.hook_resid_post"].segment("image:c1").shape == (2, 16 * 16, 64)


def test_no_tokens_no_task_and_no_noise_are_needed(tiny: HookedVLA) -> None:
    obs = make_observation()
    batch = {
        f"observation.images.{camera}": torch.as_tensor(np.asarray(image)).permute(0, 3, 1, 2) / 255
        for camera, image in obs.images.items()
    }
    # without statistics, normalised and raw are the same
    chunk = tiny.predict_action_chunk(batch | {"observation.state": obs.state})
    assert torch.equal(chunk, tiny.predict_action_chunk(replace(obs, instruction="")))
    with pytest.raises(ValueError, match="noise has 1 draws, but the model used 0"):
        tiny.predict_action_chunk(obs, noise=torch.zeros(2, 8, 4))


def test_observations_are_normalised_and_actions_come_back_in_units(edited, golden: Golden) -> None:
    images = {key for key in golden.batch if "image" in key}
    stats = {key.replace(".", "_"): (torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)) for key in images}
    stats |= {"observation_state": (torch.arange(6.0), torch.full((6,), 2.0)), "action": (torch.ones(6), torch.ones(6))}

    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, (mean, std) in stats.items():
            part = "unnormalize_outputs" if key == "action" else "normalize_inputs"
            tensors |= {f"{part}.buffer_{key}.mean": mean, f"{part}.buffer_{key}.std": std}
        return tensors

    model = HookedVLA.from_pretrained(edited(add))
    obs = make_observation()
    obs = replace(obs, images={"c0": obs.images["agent"], "c1": obs.images["wrist"]}, state=torch.ones(2, 6))
    inputs = model.prepare(obs)
    assert_close(inputs.state[:, 0], (torch.ones(2, 6) - torch.arange(6.0)) / 2)
    assert_close(inputs.images[:, 0, 0], (obs.images["c0"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    actions = model(obs)
    assert_close(actions.chunk, actions.normalized + 1)
    # the public policy's own batch is past the preprocessor
    assert_close(model.predict_action_chunk(golden.batch), golden.actions)


@pytest.mark.parametrize(
    ("option", "value"),
    [("replace_final_stride_with_dilation", True), ("temporal_ensemble_coeff", 0.01), ("feedforward_activation", "glu"),
     ("n_heads", 5), ("n_obs_steps", 2), ("input_features", {})],
)  # fmt: skip
def test_options_that_are_not_supported_are_refused(edited, option: str, value: object) -> None:
    with pytest.raises(ValueError, match="config.json"):
        HookedVLA.from_pretrained(edited(**{option: value}))


def test_bottleneck_trunks_are_refused(edited) -> None:
    add = {"model.backbone.layer1.0.conv3.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="ResNet-50"):
        HookedVLA.from_pretrained(edited(lambda tensors: tensors | add, vision_backbone="resnet50"))


def test_unknown_and_missing_keys_are_refused(edited) -> None:
    with pytest.raises(ValueError, match=r"unexpected key model.extra[\s\S]*missing key model.action_head.bias"):

        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            del tensors["model.action_head.bias"]
            return tensors | {"model.extra": torch.zeros(1)}

        HookedVLA.from_pretrained(edited(change))


def test_bad_observations_say_what_is_wrong(tiny: HookedVLA) -> None:
    obs = make_observation()
    with pytest.raises(KeyError, match=r"observation.images.wrist"):
        tiny(replace(obs, images={"agent": obs.images["agent"]}))
    with pytest.raises(ValueError, match=r"observation.state must be \[batch, 4\]"):
        tiny(replace(obs, state=torch.zeros(2, 5)))
    with pytest.raises(ValueError, match="NaN"):
        tiny(replace(obs, state=torch.full((2, 4), torch.nan)))
    with pytest.raises(ValueError, match="one number of rows"):
        tiny(replace(obs, state=torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="one image size"):
        tiny(replace(obs, images={**obs.images, "wrist": obs.images["wrist"][:, :32]}))
    with pytest.raises(TypeError, match="Observation"):
        tiny({f"observation.images.{c}": torch.zeros(2, 3, 64, 64, dtype=torch.uint8) for c in ("agent", "wrist")}
             | {"observation.state": torch.zeros(2, 4)})  # fmt: skip


def test_recipe_writes_the_same_checkpoint_again(golden: Golden, tmp_path: Path) -> None:
    write_checkpoint(Path(__file__).parents[1] / "golden" / "act", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (golden.folder / "model.safetensors").read_bytes()
