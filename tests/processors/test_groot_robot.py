"""GR00T's robots: what files of LeRobot's and NVIDIA's layouts say of them, and raw observations all the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tolerance import assert_close

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.processors.groot_robot import ImageRule, RangeNormalizer, read_robot
from hooked_vla.spec import FeatureVLASpec

STATE, ACTION = "observation.state", "action"


def spec_of(name: str) -> FeatureVLASpec:
    spec = registry.get_spec(name)
    assert isinstance(spec, FeatureVLASpec)
    return spec


def group(low: list[float], high: list[float]) -> dict[str, list[float]]:
    return {"q01": low, "q99": high, "min": [x - 1 for x in low], "max": [x + 1 for x in high], "mean": low}


def nvidia_files(**changes: object) -> dict[str, bytes]:
    """The robot side of an N1.7 checkpoint with two groups of joints."""
    modalities = {
        "video": {"delta_indices": [0], "modality_keys": ["front", "wrist"]},
        "state": {"delta_indices": [0], "modality_keys": ["arm", "hand"]},
        "action": {
            "delta_indices": [0, 1, 2, 3], "modality_keys": ["arm", "hand"],
            "action_configs": [{"rep": "relative"}, {"rep": "absolute"}],
        },
    }  # fmt: skip
    options = {
        "modality_configs": {"libero_sim": modalities}, "use_percentiles": True, "image_target_size": [256, 256],
        "image_crop_size": [230, 230], "use_albumentations": True,
    } | changes  # fmt: skip
    arm, hand = group([0.0, -1.0], [2.0, -1.0]), group([0.0], [4.0])
    statistics = {"libero_sim": {"state": {"arm": arm, "hand": hand}, "action": {"arm": arm, "hand": hand}}}
    return {
        "processor_config.json": json.dumps({"processor_kwargs": options}).encode(),
        "statistics.json": json.dumps(statistics).encode(),
        "embodiment_id.json": json.dumps({"libero_sim": 2}).encode(),
    }


def lerobot_files(version: str, **changes: object) -> dict[str, bytes]:
    """Processor files of one camera-less robot with two joints."""
    pack = {"groot_n15": "groot_pack_inputs_v3", "groot_n17": "groot_n1_7_pack_inputs_v1"}[version]
    config = {"embodiment_tag": "gr1", "embodiment_mapping": {"gr1": 3}, "formalize_language": False} | changes
    statistics = save({
        f"{key}.{name}": torch.tensor(values)
        for key in (STATE, ACTION)
        for name, values in {"min": [0.0, 1.0], "max": [2.0, 1.0], "mean": [0.5, 1.0]}.items()
    })  # fmt: skip
    steps = [{"registry_name": "rename_observations_processor", "config": {}},
             {"registry_name": pack, "config": config, "state_file": "policy_stats.safetensors"}]  # fmt: skip
    return {
        "policy_preprocessor.json": json.dumps({"steps": steps}).encode(),
        "policy_stats.safetensors": statistics,
    }


def test_ranges_go_to_minus_one_to_one_and_back() -> None:
    ranges = {STATE: {"min": torch.tensor([0.0, 1.0]), "max": torch.tensor([2.0, 1.0])}}
    plain, clipped = RangeNormalizer({}, ranges), RangeNormalizer({}, ranges, clip_state=True, clip_action=True)
    value = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 1.0]])
    assert_close(plain(STATE, value), torch.tensor([[-1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    assert_close(clipped(STATE, value)[2], torch.tensor([1.0, 0.0]))
    assert_close(plain.inverse(STATE, torch.tensor([3.0, 0.7])), torch.tensor([4.0, 1.0]))
    assert_close(clipped.inverse(STATE, torch.tensor([3.0, 0.7])), torch.tensor([2.0, 1.0]))
    assert torch.equal(plain(ACTION, value), value)
    with pytest.raises(ValueError, match="3 dimensions"):
        plain(STATE, torch.zeros(1, 3))


def test_nvidia_files_name_the_robot() -> None:
    robot = read_robot(spec_of("groot_n17"), nvidia_files())
    assert (robot.embodiment, robot.cameras, robot.n_steps, robot.formal) == (2, ("front", "wrist"), 4, True)
    assert robot.images == ImageRule(256, 230 / 256, (256, 256), area=True)
    assert (robot.width(STATE), robot.width(ACTION), robot.unsupported) == (3, 3, "")
    assert_close(robot.decode(torch.tensor([[[0.0, 5.0, 1.0]]])), torch.tensor([[[1.0, -1.0, 4.0]]]))


@pytest.mark.parametrize(("changes", "said"), [
    ({"use_relative_action": True}, "relative"),
    ({"modality_configs": {"x": {"video": {"delta_indices": [-1, 0]}, "action": {}}}}, "2 frames"),
])  # fmt: skip
def test_robots_that_are_not_supported_say_so(changes: dict, said: str) -> None:
    assert said in read_robot(spec_of("groot_n17"), nvidia_files(**changes)).unsupported


@pytest.mark.parametrize("version", ["groot_n15", "groot_n17"])
def test_lerobot_files_name_the_robot(version: str) -> None:
    robot = read_robot(spec_of(version), lerobot_files(version))
    assert (robot.embodiment, robot.cameras, robot.formal, robot.width(ACTION)) == (3, None, False, 2)
    assert robot.normalizer.statistics[STATE].keys() == {"min", "max", "mean"}
    with pytest.raises(ValueError, match="embodiment is 99"):
        read_robot(spec_of(version), lerobot_files(version, embodiment_mapping={"gr1": 99}))


def test_libero_gripper_becomes_a_sign() -> None:
    steps = [
        {"registry_name": "groot_n1_7_action_decode_v1", "config": {
            "raw_stats": {"action": {"pose": {"min": [0, 0]}, "gripper": {"min": [0]}}},
            "modality_config": {"action": {"delta_indices": [0, 1], "modality_keys": ["pose", "gripper"]}},
            "action_decode_transform": "libero",
        }},
    ]  # fmt: skip
    files = {"policy_preprocessor.json": json.dumps({"steps": steps}).encode()}
    robot = read_robot(spec_of("groot_n17"), files)
    assert (robot.gripper, robot.n_steps) == (2, 2)
    actions = robot.decode(torch.tensor([[[0.3, 0.9, 0.9], [0.3, 0.9, 0.1]]]))
    assert_close(actions, torch.tensor([[[0.3, 0.9, -1.0], [0.3, 0.9, 1.0]]]))


@pytest.mark.parametrize("name", ["groot_n15", "groot_n17"])
def test_raw_observations_are_the_batch_that_the_public_preprocessor_makes(name: str) -> None:
    """The same images, prompt and state by hand, as one preprocessed batch, give the same normalised actions."""
    model = HookedVLA.from_spec(name, "tiny", seed=0)
    assert model.spec.features.tokenizer == "bytes"
    images = {c: torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8) for c in ("wrist", "agent")}
    obs = Observation(images, torch.randn(2, 4), ["lift", "drop"])
    noise = torch.randn(2, 8, 8)
    raw = model(obs, noise)
    assert torch.equal(raw.chunk, raw.normalized)
    batch = model.processor._preprocess(  # type: ignore[attr-defined]
        {"task": ["lift", "drop"], STATE: torch.as_tensor(obs.state)}
        | {f"observation.images.{c}": image.permute(0, 3, 1, 2) for c, image in images.items()},
        ("agent", "wrist"), exact=True,
    )  # fmt: skip
    assert torch.equal(model(batch, noise).chunk[..., :4], raw.chunk)
    floats = replace(obs, images={c: image.permute(0, 3, 1, 2) / 255 for c, image in images.items()})
    assert torch.equal(model(floats, noise).chunk, raw.chunk)


@pytest.mark.parametrize("name", ["groot_n15", "groot_n17"])
def test_statistics_reach_raw_observations_only(name: str, tmp_path: Path) -> None:
    tiny = HookedVLA.from_spec(name, "tiny", seed=0)
    tiny.save_pretrained(tmp_path)
    for file, content in lerobot_files(name).items():
        (tmp_path / file).write_bytes(content)
    model = HookedVLA.from_pretrained(tmp_path)
    images = {c: torch.zeros(1, 30, 40, 3, dtype=torch.uint8) for c in ("agent", "wrist")}
    obs, noise = Observation(images, torch.tensor([[2.0, 1.0]]), "lift"), torch.randn(1, 8, 8)
    inputs = model.prepare(obs)
    assert_close(inputs.state[:, :3], torch.tensor([[1.0, 0.0, 0.0]]))
    assert inputs.embodiment.tolist() == [3]
    actions = model(obs, noise)
    assert_close(actions.chunk, torch.stack([actions.normalized[..., 0] + 1, torch.ones(1, 8)], dim=-1))
    preprocessed = model(replace(inputs, raw=False), noise)
    assert torch.equal(preprocessed.chunk, preprocessed.normalized)


def test_observations_of_unsupported_robots_are_refused(tmp_path: Path) -> None:
    tiny = HookedVLA.from_spec("groot_n17", "tiny", seed=0)
    tiny.save_pretrained(tmp_path)
    for file, content in nvidia_files(use_relative_action=True).items():
        (tmp_path / file).write_bytes(content)
    model = HookedVLA.from_pretrained(tmp_path)
    images = {c: torch.zeros(1, 30, 40, 3, dtype=torch.uint8) for c in ("front", "wrist")}
    with pytest.raises(ValueError, match="relative to the state"):
        model(Observation(images, torch.zeros(1, 3), "lift"))
