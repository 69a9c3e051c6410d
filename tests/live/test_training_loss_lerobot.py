"""Training objectives beside LeRobot's own `policy.forward`: the same loss and the same gradient of every parameter,
from the same weights, batch, noise and time.

Needs LeRobot 0.6.1 in the environment (the extra `reference`) and is skipped without it.
"""

import copy
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lerobot_compat as lerobot
import pytest
import torch
from public_checkpoints import Golden, read_golden
from safetensors.torch import load_file, load_model
from tolerance import ATOL, RTOL, assert_close
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.components.losses import sum_of_terms
from hooked_vla.lerobot import image_key
from hooked_vla.models.xvla_config import loss_terms
from hooked_vla.spec import JointFlowVLASpec
from hooked_vla.weights import KeyRules, public_state_dict

try:
    lerobot.install()
except ImportError as error:
    pytest.skip(f"comparison with LeRobot {lerobot.VERSION}: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


def random_model(name: str) -> HookedVLA:
    """A tiny model none of whose weights is 0 or 1 throughout, which would hide errors."""
    model = HookedVLA.from_spec(name, "tiny", seed=0)
    lerobot.redraw(model.net, seed=3)
    return model


def batch_for(model: HookedVLA, size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs past LeRobot's preprocessor, targets, and one row whose last two steps are padded."""
    generator, features = torch.Generator().manual_seed(seed), model.spec.features
    rows, chunk = 3, model.net.head.chunk
    batch = {image_key(camera): torch.rand(rows, 3, *size, generator=generator) for camera in features.cameras}
    batch["observation.state"] = torch.randn(rows, features.d_state, generator=generator)
    batch[TOKENS] = torch.randint(3, 250, (rows, 9), generator=generator)
    batch[TOKEN_MASK] = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    batch["action"] = torch.randn(rows, chunk, features.d_action, generator=generator)
    return batch


def padding(batch: dict[str, Tensor]) -> Tensor:
    rows, chunk = batch["action"].shape[:2]
    return torch.arange(chunk) >= torch.tensor([chunk, chunk - 2, 1])[:rows, None]


def observed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a policy that acts is given."""
    return {key: value for key, value in batch.items() if not key.startswith("action")}


def assert_gradients_equal(model: HookedVLA, policy: Any) -> None:
    """Ours, under the public keys, against LeRobot's."""
    of_gradients = copy.deepcopy(model.net)
    for ours, held in zip(model.net.parameters(), of_gradients.parameters(), strict=True):
        held.data = torch.zeros_like(ours) if ours.grad is None else ours.grad
    found = public_state_dict(of_gradients, KeyRules(model.spec.keys), model.spec.tied)
    # a shared parameter is under one of its names in the public file
    theirs: dict[int, list[str]] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            theirs.setdefault(id(parameter), []).append(name)
    for names in theirs.values():
        name = next(each for each in names if each in found)
        gradient = policy.get_parameter(name).grad
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name] / scale, gradient / scale,
            rtol=RTOL[torch.float32], atol=ATOL[torch.float32], msg=lambda text, n=name: f"{n}: {text}",
        )  # fmt: skip
    assert len(theirs) > 20


def test_smolvla() -> None:
    model = random_model("smolvla")
    policy = lerobot.policy_around(model)
    batch = batch_for(model, (64, 64))
    generator = torch.Generator().manual_seed(1)
    noise, share = torch.randn(3, 8, 8, generator=generator), torch.rand(3, generator=generator)
    time = 0.001 + 0.999 * share
    inputs = model.prepare(observed(batch))
    expected = policy.forward(dict(batch), noise=noise, time=time)[0]
    losses = model.training_loss(inputs, batch["action"], noise=[noise, share])
    assert_close(losses.mean(), expected)
    expected.backward()
    losses.mean().backward()
    assert_gradients_equal(model, policy)

    padded = padding(batch)
    rows = policy.forward(batch | {"action_is_pad": padded}, noise=noise, time=time, reduction="none")[0]
    assert_close(model.training_loss(inputs, batch["action"], ~padded, [noise, share]), rows)


def golden_policy(golden: Golden, name: str, cls: str) -> Any:
    """LeRobot's policy of a recorded checkpoint, in training mode without dropout."""
    policy = getattr(importlib.import_module(f"lerobot.policies.{name}.modeling_{name}"), cls)
    loaded = policy.from_pretrained(golden.folder, strict=True).train()
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return loaded


def targets(model: HookedVLA, rows: int) -> Tensor:
    shape = (rows, model.net.head.chunk, model.spec.features.d_action)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("padded", [False, True])
def test_act(padded: bool) -> None:
    golden = read_golden("act")
    model, policy = HookedVLA.from_pretrained(golden.folder), golden_policy(golden, "act", "ACTPolicy")
    batch = golden.batch | {"action": targets(model, 2)}
    batch["action_is_pad"] = padding(batch) & padded
    noise = torch.randn(2, model.spec.latent.d_latent, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(torch, "randn_like", lambda like: noise):
        expected, parts = policy.forward(batch)
    inputs, valid = model.prepare(golden.batch), ~batch["action_is_pad"]
    losses = model.training_loss(inputs, batch["action"], valid, [noise])
    # LeRobot weighs rows by their valid steps, but not in the divergence, which is part of every row's loss
    model.net.kl_weight = 0.0
    errors = model.training_loss(inputs, batch["action"], valid, [noise])
    loss = (errors * valid.sum(1)).sum() / valid.sum() + (losses - errors).mean()
    assert_close((losses - errors).mean(), torch.tensor(policy.config.kl_weight * parts["kld_loss"]))
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    assert_gradients_equal(model, policy)


def test_positions_of_acts_latent_encoder() -> None:
    module: Any = importlib.import_module("lerobot.policies.act.modeling_act")
    ours = HookedVLA.from_spec("act", "tiny").net.vae.pos_enc[0]
    assert_close(ours, module.create_sinusoidal_pos_embedding(*ours.shape))


@contextmanager
def gemma_of_these_sizes(module: Any, spec: JointFlowVLASpec) -> Iterator[None]:
    """LeRobot fixes the sizes of PaliGemma and of its expert in code; inside the block they are the spec's."""

    def sizes(variant: str) -> Any:
        of = spec.vlm if variant == "gemma_2b" else spec.expert
        return module.GemmaConfig(of.d_model, of.n_layers, of.d_mlp, of.n_heads, of.n_kv_heads, of.d_head)

    def paligemma(config: Any) -> Any:
        vision, text = config.vision_config, config.text_config
        vision.hidden_size, vision.intermediate_size = spec.vision.d_model, spec.vision.d_mlp
        vision.num_hidden_layers, vision.num_attention_heads = spec.vision.n_layers, spec.vision.n_heads
        vision.patch_size, vision.image_size = spec.vision.patch_size, spec.vision.image_size
        vision.projection_dim = config.projection_dim = text.hidden_size
        text.vocab_size = vision.vocab_size = config._vocab_size = spec.vlm.d_vocab
        config.image_token_id = config.image_token_index = spec.vlm.d_vocab - 1
        return vlm(config)

    def gemma(config: Any) -> Any:
        config.vocab_size = spec.expert.d_vocab
        return expert(config)

    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    with (
        mock.patch.object(module, "get_gemma_config", sizes),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", paligemma),
        mock.patch.object(module, "PiGemmaForCausalLM", gemma),
    ):
        yield


@pytest.mark.parametrize(("name", "cls"), [("pi0", "PI0Policy"), ("pi05", "PI05Policy")])
def test_pi(name: str, cls: str) -> None:
    golden = read_golden(name)
    model = HookedVLA.from_pretrained(golden.folder)
    module: Any = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    config = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(golden.folder)
    with gemma_of_these_sizes(module, model.spec):
        policy = getattr(module, cls)(config).eval()
    policy.load_state_dict(load_file(golden.folder / "model.safetensors"), strict=True)
    batch = golden.batch | {"action": targets(model, 2)}
    generator = torch.Generator().manual_seed(1)
    noise, share = torch.randn(2, 6, 10, generator=generator), torch.rand(2, generator=generator)
    policy.model.sample_noise = lambda *_: noise
    policy.model.sample_time = lambda *_: 0.001 + 0.999 * share
    expected = policy.forward(dict(batch), reduction="none")[0]
    losses = model.training_loss(model.prepare(golden.batch), batch["action"], noise=[noise, share])
    assert_close(losses, expected)
    expected.mean().backward()
    losses.mean().backward()
    assert_gradients_equal(model, policy)


def test_xvla() -> None:
    golden = read_golden("xvla")
    model = HookedVLA.from_pretrained(golden.folder)
    module: Any = importlib.import_module("lerobot.policies.xvla.modeling_xvla")
    config = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(golden.folder)
    policy = module.XVLAPolicy(config).eval()
    load_model(policy, golden.folder / "model.safetensors")
    actions = targets(model, 2)
    # grippers are probabilities
    actions[..., [9, 19]] = actions[..., [9, 19]].sigmoid()
    generator = torch.Generator().manual_seed(1)
    noise, offset = torch.randn(2, 6, 20, generator=generator), torch.rand(1, generator=generator)
    with (
        mock.patch.object(torch, "rand", lambda *_, **__: offset),
        mock.patch.object(torch, "randn_like", lambda like: noise),
    ):
        expected = policy.forward(golden.batch | {"action": actions})[0]
    losses = model.training_loss(model.prepare(golden.batch), actions, noise=[noise, offset])
    assert_close(losses.mean(), expected)
    expected.backward()
    losses.mean().backward()
    assert_gradients_equal(model, policy)


@pytest.mark.parametrize("mode", ["ee6d", "joint", "agibot_ee6d", "franka_joint7", "so101_bimanual", "auto"])
def test_xvla_objective_of_every_action_space(mode: str) -> None:
    hub: Any = importlib.import_module("lerobot.policies.xvla.action_hub")
    space = hub.build_action_space(mode, **({"real_dim": 5, "max_dim": 9} if mode == "auto" else {}))
    real = {"auto": 5, "franka_joint7": 7, "so101_bimanual": 12}.get(mode, space.dim_action)
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.rand(2, 2, 6, space.dim_action, generator=generator)
    target[..., real:] = 0
    ours = sum_of_terms(loss_terms(mode, real), predicted, target)
    assert_close(ours.mean(), sum(space.compute_loss(predicted, target).values()))


@pytest.mark.parametrize("padded", [False, True])
def test_diffusion(padded: bool) -> None:
    pytest.importorskip("diffusers", reason="LeRobot runs this policy with diffusers, which is not installed")
    golden = read_golden("diffusion")
    model = HookedVLA.from_pretrained(golden.folder)
    policy = golden_policy(golden, "diffusion", "DiffusionPolicy").eval()
    policy.config.do_mask_loss_for_padding = padded
    spec = model.spec
    generator = torch.Generator().manual_seed(1)
    actions, noise = torch.randn(2, 2, spec.horizon, spec.features.d_action, generator=generator)
    steps = torch.randint(spec.sampler.n_train_steps, (2,), generator=generator)
    batch = golden.batch | {"action": actions}
    batch["action_is_pad"] = padding(batch) & padded
    with (
        mock.patch.object(torch, "randn", lambda *_, **__: noise),
        mock.patch.object(torch, "randint", lambda *_, **__: steps),
    ):
        expected = policy.diffusion.compute_loss(batch)
    valid = ~batch["action_is_pad"]
    losses = model.training_loss(model.prepare(golden.batch), actions, valid, [noise, steps])
    # LeRobot weighs rows by their valid steps
    loss = (losses * valid.sum(1)).sum() / valid.sum()
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    assert_gradients_equal(model, policy)


def test_groot_n17() -> None:
    pytest.importorskip("diffusers", reason="LeRobot runs this policy with diffusers, which is not installed")
    golden = read_golden("groot_n17")
    model = HookedVLA.from_pretrained(golden.folder)
    module: Any = importlib.import_module("lerobot.policies.groot.groot_n1_7")
    sizes = json.loads((golden.folder / "vlm" / "config.json").read_text())
    config = module.GR00TN17Config(**json.loads((golden.folder / "config.json").read_text()))
    with mock.patch.object(module, "_cosmos_reason2_qwen3_vl_config", lambda: module.Qwen3VLConfig(**sizes)):
        policy = module.GR00TN17(config, load_backbone_weights=False).float().eval()
    policy.load_state_dict(load_file(golden.folder / "model.safetensors"))
    spec = model.spec
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, spec.flow.chunk, spec.flow.d_action, generator=generator)
    share = torch.rand(2, generator=generator)
    actions = torch.randn(2, spec.flow.chunk, spec.features.d_action, generator=generator)
    width = spec.features.d_action
    padded = torch.nn.functional.pad(actions, (0, spec.flow.d_action - width))
    mask = (torch.arange(spec.flow.d_action) < width).float().expand_as(padded)
    valid = ~padding({"action": actions})
    policy.action_head.sample_time = lambda *_, **__: (1 - share) * 0.999
    with mock.patch.object(torch, "randn", lambda *_, **__: noise):
        expected = policy.forward(golden.batch | {"action": padded, "action_mask": mask * valid[..., None]})["loss"]
    losses = model.training_loss(model.prepare(golden.batch), actions, valid, [noise, share])
    # the public loss weighs rows by their valid steps
    loss = (losses * valid.sum(1)).sum() / valid.sum()
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    assert_gradients_equal(model, policy)
