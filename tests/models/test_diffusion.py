"""Diffusion Policy against the public implementation's recorded values, and what its wiring implies."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_checkpoints import Golden, make_observation, read_golden
from recipe import read_keys
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.components.denoising import noise_schedule
from hooked_vla.inputs import StepInputs
from hooked_vla.spec import DiffusionPolicySpec
from hooked_vla.weights import KeyRules, plan_loading

N_DRAWS = 4


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("diffusion")


@pytest.fixture(scope="module")
def model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False)


def build(**changes) -> HookedVLA:
    """The tiny model with some of its spec changed."""
    spec = replace(registry.get_spec("diffusion", "tiny"), **changes)
    torch.manual_seed(0)
    return HookedVLA.from_network(spec, registry.build_network(spec).eval()).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return build()


def tiny_draws(seed: int = 0) -> list[Tensor]:
    """The starting noise and the three fresh ones of four DDPM steps."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, 4, generator=generator) for _ in range(N_DRAWS)]


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
    assert_close(model.predict_action_chunk(golden.batch, golden.noise), golden.actions)


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch, "expert.*", noise=golden.noise)
    modules = [key for key in golden.recorded if key.startswith("ref.")]
    assert len(modules) == 17
    for module in modules:
        place, number = re.fullmatch(r"ref\.diffusion\.unet\.(.*)\.(\d)", module).groups()
        place = place.replace("_modules", "")
        hook = f"expert.{place}.{number}.hook_resid_post"
        if number == "2":
            # behind the last level the reference has an identity
            hook = "expert.down.2.1.hook_resid_post" if place == "down.2" else f"expert.{place}.hook_resampled"
        assert_close(cache[hook], golden.recorded[module].transpose(-1, -2))


def test_bfloat16_stays_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    actions = model.predict_action_chunk(golden.batch, golden.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


@pytest.mark.parametrize("layout", ["one encoder per camera, batch norm", "one encoder, group norm"])
def test_published_size_has_the_published_parameters_and_keys(layout: str) -> None:
    spec = registry.get_spec("diffusion")
    assert isinstance(spec, DiffusionPolicySpec)
    keys = read_keys("diffusion")
    if "group" in layout:
        keys = {
            key.replace("rgb_encoder.0.", "rgb_encoder."): shape
            for key, shape in keys.items()
            if not re.search(r"running_|num_batches", key)
        }
    else:
        spec = replace(spec, encoder_per_camera=True, vision=replace(spec.vision, norm="batch"))
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 262_709_026
    parameters = {name: tensor.shape for name, tensor in net.state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), keys, parameters)
    assert set(plan) == set(parameters)
    assert not dropped


def test_saving_keeps_every_tensor_of_the_public_file(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (golden.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("per_camera", [True, False])
def test_two_cameras_in_both_layouts(per_camera: bool, tmp_path: Path) -> None:
    model = build(encoder_per_camera=per_camera)
    obs, draws = make_observation(), tiny_draws()
    chunk, cache = model.run_with_cache(obs, noise=draws)
    assert model.cache_size(obs) == cache.nbytes
    vision = "vision.towers.1" if per_camera else "vision"
    # two rows, two observation steps, and as many cameras as the encoder sees
    assert cache[f"{vision}.pool.hook_keypoints"].shape == (4 if per_camera else 8, 4, 2)
    assert cache[f"{vision}.pool.hook_heatmap"].segment("image:wrist").shape[0] == 4
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.startswith("diffusion.rgb_encoder.1.backbone.4.0.conv1") for key in keys) == per_camera
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec.encoder_per_camera == per_camera
    assert torch.equal(again(obs, draws).chunk, chunk.chunk)


def test_draws_are_taken_in_order_and_counted(tiny: HookedVLA) -> None:
    obs, draws = make_observation(), tiny_draws()
    torch.manual_seed(5)
    fresh = tiny(obs).chunk
    torch.manual_seed(5)
    assert torch.equal(tiny(obs, [torch.randn(2, 8, 4) for _ in range(N_DRAWS)]).chunk, fresh)
    with pytest.raises(ValueError, match="noise has 3 draws, but the model needs more"):
        tiny(obs, draws[:3])
    with pytest.raises(ValueError, match="noise has 5 draws, but the model used 4"):
        tiny(obs, [*draws, draws[0]])
    with pytest.raises(ValueError, match=r"noise must be \[2, 8, 4\]"):
        tiny(obs, [draw[:, :4] for draw in draws])


def test_ddim_draws_the_starting_noise_only() -> None:
    sampler = registry.get_spec("diffusion", "tiny").sampler
    model = build(sampler=replace(sampler, kind="ddim"))
    assert torch.equal(
        model(make_observation(), tiny_draws()[0]).chunk, model(make_observation(), tiny_draws()[0]).chunk
    )


def test_hook_points_show_the_denoising(tiny: HookedVLA) -> None:
    draws = tiny_draws()
    actions, cache = tiny.run_with_cache(make_observation(), "expert.hook_*", noise=draws)
    assert torch.equal(cache["expert.hook_noisy_actions"][0], draws[0])
    # the condition is one tensor for all steps, and is held once
    assert cache["expert.hook_condition"].shape[0] == len(cache.parts["expert.hook_noisy_actions"]) == 4
    assert len(cache.parts["expert.hook_condition"]) == 1
    for i, step in enumerate(tiny.net.head.steps):
        noisy, noise = cache["expert.hook_noisy_actions"][i], cache["expert.hook_noise"][i]
        clean = ((noisy - step.noise * noise) / step.signal).clamp(-1, 1)
        assert_close(cache["expert.hook_clean_actions"][i], clean)
    # the last step has no fresh noise and goes all the way; the chunk starts at the present observation
    assert actions is not None
    assert_close(actions.normalized, cache["expert.hook_clean_actions"][-1][:, 1:5])


def test_patching_all_inputs_of_the_expert_reproduces_the_source(tiny: HookedVLA) -> None:
    a, b, draws = make_observation(seed=0), make_observation(seed=1), tiny_draws()
    expected, cache = tiny.run_with_cache(b, "expert.hook_condition", noise=draws)
    patch = [("expert.hook_condition", lambda value, hook: cache[hook.name][hook.denoise_step])]
    assert expected is not None
    assert torch.equal(tiny.run_with_hooks(a, patch, noise=draws).chunk, expected.chunk)
    assert not torch.equal(tiny.run_with_hooks(a, patch, noise=draws, at_steps=[0]).chunk, expected.chunk)
    assert not torch.equal(tiny(a, draws).chunk, expected.chunk)


def test_film_multiplies_by_the_scale_itself(tiny: HookedVLA) -> None:
    _, cache = tiny.run_with_cache(make_observation(), "expert.mid.0.*", noise=tiny_draws())
    scale, shift = (cache[f"expert.mid.0.hook_film_{part}"][:, :, None] for part in ("scale", "shift"))
    assert_close(cache["expert.mid.0.hook_modulated"], scale * cache["expert.mid.0.hook_conv1"] + shift)


def test_upward_levels_read_the_skip_beside_what_comes_from_below(tiny: HookedVLA) -> None:
    _, cache = tiny.run_with_cache(make_observation(), "expert.*", noise=tiny_draws())
    both = torch.cat([cache["expert.mid.1.hook_resid_post"], cache["expert.down.1.1.hook_resid_post"]], dim=-1)
    assert torch.equal(cache["expert.up.0.hook_with_skip"], both)
    assert cache["expert.up.0.hook_resampled"].segment("action").shape == (4, 2, 8, 16)


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs, draws = tiny.prepare(make_observation()), tiny_draws()
    both = tiny.sample_actions(inputs, draws)
    for row in range(2):
        assert_close(
            tiny.sample_actions(inputs.rows([row]), [draw[row : row + 1] for draw in draws]), both[row : row + 1]
        )


def test_pixels_outside_the_crop_do_not_reach_the_actions(tiny: HookedVLA) -> None:
    # 48 × 80 pixels, of which the middle 40 × 64 are read
    obs, draws = make_observation(), tiny_draws()
    outside, inside = ({camera: image.clone() for camera, image in obs.images.items()} for _ in range(2))
    outside["agent"][:, :4] = outside["agent"][:, :, -8:] = 0
    inside["agent"][:, 4] = 0
    assert torch.equal(tiny(replace(obs, images=outside), draws).chunk, tiny(obs, draws).chunk)
    assert not torch.equal(tiny(replace(obs, images=inside), draws).chunk, tiny(obs, draws).chunk)
    with pytest.raises(ValueError, match="48 × 60 pixels, but the model reads 40 × 64"):
        tiny(replace(obs, images={camera: image[:, :, :60] for camera, image in obs.images.items()}), draws)


def test_select_action_sees_the_last_observations(tiny: HookedVLA) -> None:
    observations = [make_observation(seed=seed) for seed in range(6)]
    tiny.reset()
    actions = torch.stack([tiny.select_action(obs, tiny_draws()) for obs in observations], dim=1)
    # at the start of an episode the first observation stands for those before it
    assert torch.equal(actions[:, :4], tiny(observations[0], tiny_draws()).chunk)
    second = steps(tiny, observations[3], observations[4])
    assert torch.equal(actions[:, 4:], tiny(second, tiny_draws()).chunk[:, :2])
    tiny.reset()
    assert torch.equal(
        tiny.select_action(observations[5], tiny_draws()), tiny(observations[5], tiny_draws()).chunk[:, 0]
    )


def steps(model: HookedVLA, *observations: Observation) -> StepInputs:
    parts = [model.prepare(obs) for obs in observations]
    return parts[-1].follow(parts[:-1])


def test_wrong_numbers_of_observation_steps_are_refused(golden: Golden, model: HookedVLA) -> None:
    for key in golden.batch:
        batch = golden.batch | {key: golden.batch[key].repeat_interleave(2, dim=1)}
        with pytest.raises(ValueError, match="must have 2 observation steps"):
            model.predict_action_chunk(batch, golden.noise)


@pytest.mark.parametrize(
    ("option", "value"),
    [("prediction_type", "v_prediction"), ("noise_scheduler_type", "PNDM"), ("beta_schedule", "cosine"),
     ("num_inference_steps", 21), ("n_groups", 3), ("horizon", 12), ("input_features", {})],
)  # fmt: skip
def test_options_that_are_not_supported_are_refused(edited, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"config.json|unknown|denoising steps|horizon"):
        HookedVLA.from_pretrained(edited(**{option: value}))


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid"])
def test_schedules_lose_signal_all_the_way(schedule: str) -> None:
    sampler = replace(registry.get_spec("diffusion").sampler, schedule=schedule)
    left = noise_schedule(sampler)
    assert len(left) == 100
    assert (left.diff() < 0).all()
    assert 0 < float(left[-1]) < float(left[0]) < 1


def test_number_of_steps_can_change_after_training(edited, golden: Golden) -> None:
    model = HookedVLA.from_pretrained(edited(num_inference_steps=None, noise_scheduler_type="DDIM"))
    assert model.n_denoise_steps == 20
    assert [step.time for step in model.net.head.steps] == list(range(19, -1, -1))
    assert model.predict_action_chunk(golden.batch, golden.noise[0]).shape == (2, 4, 6)
