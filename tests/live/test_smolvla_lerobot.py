"""SmolVLA beside LeRobot's own implementation, on tiny random policies in many configurations.

Needs LeRobot 0.6.1 in the environment (the extra `reference`) and is skipped without it. Every policy is written by
LeRobot, read by `HookedVLA.from_pretrained`, and must give the same actions from the same batch and noise.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lerobot_compat as lerobot
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.policy import byte_tokenizer
from hooked_vla.spec import DecoderSpec, FlowVLASpec, VisionSpec

try:
    lerobot.install()
except ImportError as error:
    pytest.skip(f"comparison with LeRobot {lerobot.VERSION}: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

Batch = dict[str, Tensor]

VISION = VisionSpec(
    image_size=64, patch_size=8, d_model=48, n_layers=2, n_heads=3, d_mlp=64, act="gelu_pytorch_tanh", eps=1e-6
)
# rope_base is fixed in LeRobot's code, whatever the language model's configuration says
TEXT = DecoderSpec(
    d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=96, act="silu", eps=1e-5, rope_base=10_000.0,
    d_vocab=128,
)  # fmt: skip
POLICY = {
    "chunk_size": 8, "n_action_steps": 8, "max_state_dim": 10, "max_action_dim": 10, "num_steps": 4,
    "num_vlm_layers": 4, "resize_imgs_with_padding": (64, 64), "tokenizer_max_length": 12,
}  # fmt: skip
SPECIAL_TOKENS = {
    "image_start": [lerobot.FAKE_IMAGE_TOKEN, lerobot.GLOBAL_IMAGE_TOKEN],
    "image_end": [lerobot.FAKE_IMAGE_TOKEN],
}
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


def image(camera: str) -> str:
    return camera if camera.startswith("observation.") else f"observation.images.{camera}"


@dataclass(frozen=True)
class Case:
    """One configuration: sizes, changes to POLICY, cameras as (height, width), and a change to the batch."""

    vision: VisionSpec = VISION
    text: DecoderSpec = TEXT
    scale: int = 4
    policy: Mapping[str, Any] = field(default_factory=dict)
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"top": (64, 64), "wrist": (64, 64)})
    d_state: int = 6
    d_action: int = 6
    lengths: tuple[int, ...] = (12, 7)
    change: Callable[[Batch], Batch] = dict
    geometry: Mapping[str, Any] | None = None

    def config(self) -> Any:
        return lerobot.vlm_config(self.vision, self.text, self.scale)

    def make(self, seed: int = 0) -> Any:
        cameras = {image(camera): size for camera, size in self.cameras.items()}
        return lerobot.make_policy(
            self.config(), cameras, self.d_state, self.d_action, seed, **POLICY | dict(self.policy)
        )

    def save(self, policy: Any, folder: Path) -> None:
        resize = policy.config.resize_imgs_with_padding
        # LeRobot takes None here but cannot write it
        policy.config.resize_imgs_with_padding = resize or (1, 1)
        lerobot.save_policy(policy, self.config(), folder)
        policy.config.resize_imgs_with_padding = resize
        if resize is None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"resize_imgs_with_padding": None}))
        if self.geometry is not None:
            (folder / "geometry.json").write_text(json.dumps(self.geometry))

    def batch(self, seed: int = 1) -> Batch:
        """Random inputs, one row for each length of text, text padded on the right."""
        generator = torch.Generator().manual_seed(seed)
        rows, n_text = len(self.lengths), max(*self.lengths, 1)
        assert self.text.d_vocab is not None
        batch = {image(c): torch.rand(rows, 3, *size, generator=generator) for c, size in self.cameras.items()}
        batch["observation.state"] = torch.randn(rows, self.d_state, generator=generator)
        batch[TOKENS] = torch.randint(0, self.text.d_vocab, (rows, n_text), generator=generator)
        batch[TOKEN_MASK] = torch.arange(n_text) < torch.tensor(self.lengths)[:, None]
        return self.change(batch)

    def noise(self, seed: int = 2) -> Tensor:
        sizes = POLICY | dict(self.policy)
        shape = (len(self.lengths), sizes["chunk_size"], sizes["max_action_dim"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(**sizes: Any) -> DecoderSpec:
    return replace(TEXT, **sizes)


def vision(**sizes: Any) -> VisionSpec:
    return replace(VISION, **sizes)


def without(*cameras: str) -> Callable[[Batch], Batch]:
    """The batch of a robot that lacks these cameras."""
    return lambda batch: {key: value for key, value in batch.items() if key not in map(image, cameras)}


def hiding(camera: str, *seen: int) -> Callable[[Batch], Batch]:
    """The batch with a mask that says, per row, whether the camera's image is real."""
    return lambda batch: batch | {f"{image(camera)}_padding_mask": torch.tensor(seen)}


def over_time(batch: Batch) -> Batch:
    """The batch with a time axis of three steps, the last of which is the one to use."""
    longer = {}
    for key, value in batch.items():
        past = "images" in key or key == "observation.state"
        longer[key] = torch.stack([value * 0.5, value * 0.1, value], dim=1) if past else value
    return longer


CASES = {
    "base": Case(),
    # the language model and the expert
    "wide": Case(text=text(d_model=96, n_heads=6, n_kv_heads=3, d_mlp=160)),
    "two-layers": Case(text=text(n_layers=2), policy={"num_vlm_layers": 2}),
    "five-layers": Case(text=text(n_layers=5), policy={"num_vlm_layers": 5}),
    "first-layers-only": Case(text=text(n_layers=6)),
    "all-layers": Case(text=text(n_layers=3), policy={"num_vlm_layers": -1}),
    "more-layers-asked-than-exist": Case(policy={"num_vlm_layers": 16}),
    "num-expert-layers-0": Case(policy={"num_expert_layers": 0}),
    "num-expert-layers-stated": Case(policy={"num_expert_layers": 4}),
    "num-expert-layers-stated-alone": Case(policy={"num_expert_layers": 4, "num_vlm_layers": -1}),
    "one-kv-head": Case(text=text(n_kv_heads=1)),
    "as-many-kv-heads-as-heads": Case(text=text(n_kv_heads=4)),
    "one-head": Case(text=text(n_heads=1, n_kv_heads=1)),
    "d_head-8": Case(text=text(n_heads=8, n_kv_heads=2, d_head=8)),
    "d_head-32-wider-than-the-model": Case(text=text(n_heads=4, n_kv_heads=2, d_head=32)),
    "d_head-24": Case(text=text(d_model=72, n_heads=3, n_kv_heads=1, d_head=24)),
    "vocabulary-300": Case(text=text(d_vocab=300)),
    "vocabulary-smaller-than-special-ids": Case(text=text(d_vocab=50)),
    "text-eps": Case(text=text(eps=1e-2)),
    "text-gelu": Case(text=text(act="gelu_pytorch_tanh")),
    "expert-half-as-wide": Case(policy={"expert_width_multiplier": 0.5}),
    "expert-as-wide": Case(policy={"expert_width_multiplier": 1.0}),
    "expert-wider": Case(policy={"expert_width_multiplier": 1.5}),
    "expert-width-rounded-down": Case(policy={"expert_width_multiplier": 0.66}),
    # the schedule of the expert's layers
    "self-attention-only": Case(policy={"attention_mode": "self_attn"}),
    "self-attention-only-every-3": Case(policy={"attention_mode": "self_attn", "self_attn_every_n_layers": 3}),
    "cross-attention-only": Case(policy={"self_attn_every_n_layers": -1}),
    "self-attention-every-1": Case(policy={"self_attn_every_n_layers": 1}),
    "self-attention-every-3": Case(
        text=text(n_layers=7), policy={"self_attn_every_n_layers": 3, "num_vlm_layers": 7}
    ),
    "cross-attention-one-kv-head": Case(text=text(n_kv_heads=1), policy={"self_attn_every_n_layers": -1}),
    # the vision tower
    "vision-wide": Case(vision=vision(d_model=96, n_layers=3, n_heads=4, d_mlp=128)),
    "vision-gelu-eps": Case(vision=vision(act="gelu", eps=1e-3)),
    "patch-16": Case(vision=vision(patch_size=16)),
    "patch-4-scale-2": Case(vision=vision(patch_size=4, image_size=32), scale=2,
                            policy={"resize_imgs_with_padding": (32, 32)}),
    "scale-1": Case(vision=vision(patch_size=16), scale=1),
    "scale-8": Case(scale=8),
    "position-table-larger": Case(vision=vision(image_size=128)),
    "position-table-smaller": Case(vision=vision(image_size=32)),
    "position-table-in-no-ratio": Case(vision=vision(image_size=88)),
    "position-table-smaller-in-no-ratio": Case(
        vision=vision(image_size=40), policy={"resize_imgs_with_padding": (96, 96)}
    ),
    "image-not-square": Case(policy={"resize_imgs_with_padding": (128, 32)}),
    "image-not-square-upright": Case(policy={"resize_imgs_with_padding": (32, 128)}),
    "image-with-a-rest-beside-patches": Case(policy={"resize_imgs_with_padding": (69, 66)}),
    # cameras
    "one-camera": Case(cameras={"top": (64, 64)}),
    "three-cameras": Case(cameras={"top": (64, 64), "left": (64, 64), "right": (64, 64)}),
    "camera-order-is-the-configuration's": Case(change=lambda batch: dict(reversed(batch.items()))),
    "cameras-wide-and-upright": Case(cameras={"top": (48, 80), "wrist": (80, 48)}),
    "cameras-large-and-small": Case(cameras={"top": (120, 160), "wrist": (30, 17)}),
    "cameras-not-resized": Case(policy={"resize_imgs_with_padding": None}),
    "cameras-not-resized-with-a-rest": Case(
        policy={"resize_imgs_with_padding": None}, cameras={"top": (70, 65), "wrist": (70, 65)}
    ),
    "camera-outside-the-usual-names": Case(
        cameras={"observation.image": (64, 64), "top": (64, 64)}, change=hiding("observation.image", True, False)
    ),
    "empty-camera": Case(policy={"empty_cameras": 1}),
    "two-empty-cameras": Case(policy={"empty_cameras": 2}, cameras={"top": (48, 80)}),
    "empty-camera-and-another-missing": Case(
        cameras={"top": (64, 64), "left": (48, 80), "right": (64, 64)},
        policy={"empty_cameras": 2}, change=without("right"),
    ),
    "missing-camera-not-the-last": Case(
        cameras={"top": (64, 64), "left": (48, 80), "right": (64, 64)},
        policy={"empty_cameras": 2}, change=without("top"),
    ),
    "missing-camera-between-special-tokens": Case(
        cameras={"top": (64, 64), "left": (48, 80), "right": (64, 64)},
        policy={"empty_cameras": 2, "add_image_special_tokens": True}, geometry={"prefix": SPECIAL_TOKENS},
        change=without("left"),
    ),
    "empty-camera-present": Case(
        policy={"empty_cameras": 1},
        change=lambda batch: batch | {image("empty_camera_0"): batch[image("top")].flip(-1)},
    ),
    "camera-hidden-in-one-row": Case(change=hiding("top", True, False)),
    "camera-hidden-in-all-rows": Case(change=hiding("wrist", False, False)),
    "camera-mask-of-integers": Case(change=hiding("top", 0, 1)),
    "all-cameras-hidden-in-one-row": Case(cameras={"top": (64, 64)}, change=hiding("top", True, False)),
    "no-image-and-no-text-in-one-row": Case(
        cameras={"top": (64, 64)}, lengths=(9, 0), change=hiding("top", True, False)
    ),
    "no-resize-and-an-empty-camera": Case(policy={"resize_imgs_with_padding": None, "empty_cameras": 1}),
    # the prefix
    "special-tokens": Case(policy={"add_image_special_tokens": True}, geometry={"prefix": SPECIAL_TOKENS}),
    "special-tokens-and-a-hidden-camera": Case(
        policy={"add_image_special_tokens": True}, geometry={"prefix": SPECIAL_TOKENS},
        change=hiding("top", False, True),
    ),
    "special-tokens-padded-cross": Case(
        policy={"add_image_special_tokens": True, "prefix_length": 64, "self_attn_every_n_layers": -1},
        geometry={"prefix": SPECIAL_TOKENS},
    ),
    "prefix-padded": Case(policy={"prefix_length": 40}),
    "prefix-padded-self-attention": Case(policy={"prefix_length": 40, "attention_mode": "self_attn"}),
    "prefix-padded-empty-camera": Case(policy={"prefix_length": 50, "empty_cameras": 1}),
    "prefix-longer-than-its-padding": Case(policy={"prefix_length": 5}),
    "one-token-of-text": Case(lengths=(1, 1)),
    "no-text-in-one-row": Case(lengths=(9, 0)),
    "text-padded-in-every-row": Case(change=lambda batch: batch | {
        TOKENS: torch.nn.functional.pad(batch[TOKENS], (0, 6)),
        TOKEN_MASK: torch.nn.functional.pad(batch[TOKEN_MASK], (0, 6)),
    }),
    "one-row": Case(lengths=(9,)),
    "five-rows": Case(lengths=(12, 3, 1, 8, 12)),
    # time axes, widths, the flow
    "time-axis": Case(change=over_time),
    "time-axis-not-square": Case(cameras={"top": (48, 80), "wrist": (80, 48)}, change=over_time),
    "chunk-1": Case(policy={"chunk_size": 1, "n_action_steps": 1}),
    "chunk-50": Case(policy={"chunk_size": 50, "n_action_steps": 10}),
    "one-step": Case(policy={"num_steps": 1}),
    "ten-steps": Case(policy={"num_steps": 10}),
    "seven-steps": Case(policy={"num_steps": 7}),
    "periods": Case(policy={"min_period": 1e-2, "max_period": 1.0}),
    "state-and-action-widths": Case(d_state=3, d_action=7, policy={"max_state_dim": 5, "max_action_dim": 12}),
    "nothing-padded": Case(d_state=10, d_action=10),
}  # fmt: skip


def both(case: Case, folder: Path, seed: int = 0) -> tuple[Any, HookedVLA]:
    """LeRobot's policy and ours, read from its files."""
    policy = case.make(seed)
    case.save(policy, folder)
    return policy, HookedVLA.from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_actions_equal_lerobots(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    policy, model = both(case, tmp_path)
    batch, noise = case.batch(), case.noise()
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    assert expected.abs().max() > 0.1
    assert_close(model.predict_action_chunk(batch, noise=noise), expected)


def test_the_comparison_sees_every_input() -> None:
    """Each input, and each element of it that counts, moves LeRobot's actions by far more than the tolerance."""
    case = Case(cameras={"top": (48, 80), "wrist": (80, 48)})
    policy, batch, noise = case.make(), case.batch(), case.noise()
    expected = policy.predict_action_chunk(dict(batch), noise=noise)

    def moved(changes: Batch, noise: Tensor = noise) -> float:
        return float((policy.predict_action_chunk(batch | changes, noise=noise) - expected).abs().max())

    tokens, mask, state = batch[TOKENS], batch[TOKEN_MASK], batch["observation.state"]
    moves = {
        "top": moved({image("top"): batch[image("top")].flip(-1)}),
        "wrist": moved({image("wrist"): batch[image("wrist")].flip(-2)}),
        "order": moved({image("top"): batch[image("wrist")], image("wrist"): batch[image("top")]}),
        "state": moved({"observation.state": torch.cat([state[:, :-1], state[:, -1:] + 1], dim=1)}),
        "tokens": moved({TOKENS: torch.where(mask, (tokens + 1) % 128, tokens)}),
        "mask": moved({TOKEN_MASK: torch.ones_like(mask)}),
        "noise": moved({}, noise.flip(1)),
        "hidden": moved(hiding("top", True, False)({})),
    }
    assert min(moves.values()) > 1e-3, moves


@pytest.mark.parametrize(
    "name",
    ["base", "special-tokens", "self-attention-only", "self-attention-every-3", "first-layers-only", "empty-camera",
     "text-eps", "d_head-24", "position-table-in-no-ratio"],
)  # fmt: skip
def test_lerobot_reads_what_we_save(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    policy, model = both(case, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    again = lerobot.load_policy(tmp_path / "ours", case.config())
    batch, noise = case.batch(), case.noise()
    actions = again.predict_action_chunk(dict(batch), noise=noise)
    assert torch.equal(actions, policy.predict_action_chunk(dict(batch), noise=noise))
    assert_close(HookedVLA.from_pretrained(tmp_path / "ours").predict_action_chunk(batch, noise=noise), actions)


@pytest.mark.parametrize("schedule", ["joint cross joint cross", "joint cross cross joint", "cross " * 4, "joint " * 4])
def test_lerobot_reads_a_model_made_from_a_spec(schedule: str, tmp_path: Path) -> None:
    spec = registry.get_spec("smolvla", size="tiny")
    assert isinstance(spec, FlowVLASpec)
    spec = replace(spec, expert=replace(spec.expert, schedule=tuple(schedule.split())))
    assert spec.vlm.d_vocab is not None
    model = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    lerobot.redraw(model.net, seed=4)
    model.save_pretrained(tmp_path)
    vlm = lerobot.vlm_config(spec.vision, spec.vlm, spec.connector.scale)
    policy = lerobot.load_policy(tmp_path, vlm, expert_d_mlp=spec.expert.decoder.d_mlp)
    generator = torch.Generator().manual_seed(0)
    batch = {
        **{image(camera): torch.rand(2, 3, 48, 80, generator=generator) for camera in spec.features.cameras},
        "observation.state": torch.randn(2, spec.features.d_state, generator=generator),
        TOKENS: torch.randint(0, spec.vlm.d_vocab, (2, 9), generator=generator),
        TOKEN_MASK: torch.ones(2, 9, dtype=torch.bool),
    }
    noise = torch.randn(2, spec.flow.chunk, spec.flow.d_action, generator=generator)
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    assert_close(model.predict_action_chunk(batch, noise=noise), expected)


# From a raw observation to actions in the robot's units.

TASKS = ["put the red block on the tray", "lift"]
MODES = [
    {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    {"VISUAL": "IDENTITY", "STATE": "QUANTILE10", "ACTION": "MEAN_STD"},
    {"VISUAL": "MEAN_STD", "STATE": "IDENTITY", "ACTION": "MIN_MAX"},
]
PIPELINE = Case(text=text(d_vocab=300), cameras={"top": (48, 80), "wrist_left": (64, 64)}, lengths=(1, 1))


def statistics(seed: int = 5) -> dict[str, dict[str, Tensor]]:
    """Statistics of a data set, one dimension of state and action constant, one feature that no policy has."""
    generator = torch.Generator().manual_seed(seed)

    def feature(*shape: int) -> dict[str, Tensor]:
        low, *widths = (torch.rand(*shape, generator=generator) + 0.1 for _ in range(6))
        marks = dict(
            zip(("min", "q01", "q10", "q90", "q99", "max"), torch.stack([low, *widths]).cumsum(0), strict=True)
        )
        return marks | {"mean": low + 0.3, "std": widths[0], "count": torch.tensor([100.0])}

    values = {image(camera): feature(3, 1, 1) for camera in PIPELINE.cameras}
    values |= {"observation.state": feature(6), "action": feature(6), "timestamp": feature(1)}
    for key in ("observation.state", "action"):
        for mark in ("q01", "q10", "q90", "q99", "max"):
            values[key][mark][2] = values[key]["min"][2]
        values[key]["std"][2] = 0.0
        values[key]["mean"][2] = values[key]["min"][2]
    return values


def raw_batch(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: value for key, value in PIPELINE.batch().items() if "language" not in key}
    batch["observation.state"][:, 2] = values["observation.state"]["min"][2]
    return batch | {"task": TASKS}


def observation_of(batch: Mapping[str, Any]) -> Observation:
    images = {camera: batch[image(camera)] for camera in PIPELINE.cameras}
    return Observation(images, batch["observation.state"], batch["task"])


def policy_with_tokenizer(modes: Mapping[str, str], folder: Path, **config: Any) -> Any:
    policy = replace(PIPELINE, policy={"normalization_mapping": lerobot.modes(modes), **config}).make()
    byte_tokenizer().save_pretrained(folder / "vlm")
    PIPELINE.save(policy, folder)
    return policy


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(modes.values()))
def test_raw_observations_equal_lerobots_pipeline(
    modes: Mapping[str, str], padding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_with_tokenizer(modes, tmp_path, tokenizer_max_length=40, pad_language_to=padding)
    # LeRobot takes "./vlm", the tokenizer's place, from the working directory
    monkeypatch.chdir(tmp_path)
    values = statistics()
    before, after = lerobot.make_processors(policy, values)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    batch, noise = raw_batch(values), PIPELINE.noise()
    prepared = before(dict(batch))
    assert prepared[TOKENS].shape == (2, 30 if padding == "longest" else 40)
    normalized = policy.predict_action_chunk(dict(prepared), noise=noise)
    expected = after(normalized)

    model = HookedVLA.from_pretrained(tmp_path)
    actions = model(observation_of(batch), noise=noise)
    assert_close(actions.normalized, normalized)
    assert_close(actions.chunk, expected)
    assert_close(model.predict_action_chunk(batch, noise=noise), expected)
    # past LeRobot's preprocessor, our actions are normalised, as LeRobot's are
    assert_close(model.predict_action_chunk(prepared, noise=noise), normalized)
    model.save_pretrained(tmp_path / "ours")
    again = HookedVLA.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.predict_action_chunk(batch, noise=noise), actions.chunk)


def test_byte_images_equal_lerobots_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_with_tokenizer(MODES[0], tmp_path)
    monkeypatch.chdir(tmp_path)
    values = statistics()
    before, after = lerobot.make_processors(policy, values)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    batch, noise = raw_batch(values), PIPELINE.noise()
    pixels = {camera: (batch[image(camera)] * 255).round().byte() for camera in PIPELINE.cameras}
    floats = {image(camera): value.float() / 255 for camera, value in pixels.items()}
    prepared = before(batch | floats | {"task": ["lift", "lift"]})
    expected = after(policy.predict_action_chunk(prepared, noise=noise))
    images = {camera: value.permute(0, 2, 3, 1).numpy() for camera, value in pixels.items()}
    obs = Observation(images, batch["observation.state"].numpy(), "lift")
    assert_close(HookedVLA.from_pretrained(tmp_path).predict_action_chunk(obs, noise=noise), expected)


@pytest.mark.parametrize("robot", ["", "so100_", "so100-blue_"])
@pytest.mark.parametrize("modes", MODES[:2], ids=lambda modes: modes["STATE"])
def test_statistics_among_the_weights_equal_lerobots_pipeline(
    modes: Mapping[str, str], robot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older layout: buffers of normalisation modules beside the weights, and keys as torch.compile leaves them."""
    policy = policy_with_tokenizer(modes, tmp_path, tokenizer_max_length=40)
    monkeypatch.chdir(tmp_path)
    values = statistics()
    before, after = lerobot.make_processors(policy, values)
    batch, noise = raw_batch(values), PIPELINE.noise()
    expected = after(policy.predict_action_chunk(before(dict(batch)), noise=noise))

    weights = load_file(tmp_path / "model.safetensors")
    stored = {key.replace("model.", "model._orig_mod.", 1): value for key, value in weights.items()}
    marks = ("mean", "std") if modes["STATE"] == "MEAN_STD" else ("min", "max")
    for module, feature in (
        ("normalize_inputs", "observation.state"), ("normalize_targets", "action"), ("unnormalize_outputs", "action")
    ):  # fmt: skip
        buffer = f"{module}.{robot}buffer_{feature.replace('.', '_')}"
        stored |= {f"{buffer}.{mark}": values[feature][mark].clone() for mark in marks}
    save_file(stored, tmp_path / "model.safetensors")
    model = HookedVLA.from_pretrained(tmp_path)
    assert_close(model.predict_action_chunk(batch, noise=noise), expected)
    model.save_pretrained(tmp_path / "ours")
    again = HookedVLA.from_pretrained(tmp_path / "ours")
    assert_close(again.predict_action_chunk(batch, noise=noise), expected)


@pytest.mark.parametrize("case", ["unset", "of several robots"])
def test_statistics_that_are_no_ones_leave_values_unchanged(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first published base checkpoint; LeRobot passes such values on unchanged."""
    policy = policy_with_tokenizer(MODES[0], tmp_path, tokenizer_max_length=40)
    monkeypatch.chdir(tmp_path)
    batch, noise = raw_batch(statistics()), PIPELINE.noise()
    before, after = lerobot.make_processors(policy, {})
    expected = after(policy.predict_action_chunk(before(dict(batch)), noise=noise))
    stored = load_file(tmp_path / "model.safetensors")
    for mark in ("mean", "std"):
        if case == "unset":
            stored[f"normalize_inputs.buffer_observation_state.{mark}"] = torch.full((6,), torch.inf)
            continue
        for i, robot in enumerate(("so100", "so100-blue", "so100-red")):
            stored[f"unnormalize_outputs.{robot}_buffer_action.{mark}"] = torch.full((6,), 1.0 + i)
    save_file(stored, tmp_path / "model.safetensors")
    model = HookedVLA.from_pretrained(tmp_path)
    assert_close(model.predict_action_chunk(batch, noise=noise), expected)


# Mixed precision.


def in_published_precision(policy: Any) -> Any:
    """A copy in the precision of the published files: heads and re-created cross projections float32, else bfloat16."""
    mixed = copy.deepcopy(policy)
    network = mixed.model.vlm_with_expert.to(torch.bfloat16)
    every = mixed.config.self_attn_every_n_layers
    for i, layer in enumerate(network.lm_expert.layers):
        if "cross" in mixed.config.attention_mode and (every <= 0 or i % every):
            layer.self_attn.k_proj.float()
            layer.self_attn.v_proj.float()
    return mixed


@pytest.mark.parametrize("name", ["base", "self-attention-only", "wide", "cross-attention-only"])
def test_bfloat16_is_as_close_as_lerobots_mixed_precision(name: str, tmp_path: Path) -> None:
    case, errors = CASES[name], {"ours": [], "theirs": []}
    for seed in range(4):
        policy = case.make(seed)
        case.save(policy, tmp_path / str(seed))
        model = HookedVLA.from_pretrained(tmp_path / str(seed), dtype=torch.bfloat16)
        batch, noise = case.batch(seed), case.noise(seed)
        exact = policy.predict_action_chunk(dict(batch), noise=noise)
        mixed = in_published_precision(policy).predict_action_chunk(dict(batch), noise=noise)
        ours = model.predict_action_chunk(batch, noise=noise)
        for who, actions in (("ours", ours), ("theirs", mixed)):
            assert actions.dtype == torch.float32
            errors[who].append(float((actions - exact).abs().max() / exact.abs().max()))
    print({who: [f"{each:.1e}" for each in found] for who, found in errors.items()})
    assert max(errors["ours"]) <= 2 * max(errors["theirs"]), errors


def test_a_file_in_published_precision_reads_exactly_in_float32(tmp_path: Path) -> None:
    case = CASES["base"]
    mixed = in_published_precision(case.make())
    case.save(mixed, tmp_path)
    assert {str(value.dtype) for value in load_file(tmp_path / "model.safetensors").values()} == {
        "torch.bfloat16", "torch.float32",
    }  # fmt: skip
    model = HookedVLA.from_pretrained(tmp_path)
    batch, noise = case.batch(), case.noise()
    assert_close(model.predict_action_chunk(batch, noise=noise), mixed.float().predict_action_chunk(batch, noise=noise))
