"""LeRobot 0.6.1 beside CPU torch and on Python 3.11: call `install()` before the first `import lerobot`.

Two obstacles are removed, neither of which changes what LeRobot computes:

1. LeRobot asks for Python 3.12 because a few of its files use PEP 695: `class Name[T]`, `def name[T]`, `type X = ...`.
   On 3.11 those lines are rewritten, with `typing.Generic`, while the files are imported.
2. PyPI's torchvision is built for CUDA, and beside a CPU build of torch its import stops at an operator that its
   compiled half would have registered. Two empty declarations let it pass; SmolVLA calls neither.

The rest of the file makes SmolVLA policies without the hub, which LeRobot asks for the geometry and the tokenizer
of the language model that a policy is named after.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch

from hooked_vla import HookedVLA
from hooked_vla.lerobot import image_key
from hooked_vla.spec import DecoderSpec, FlowVLASpec, VisionSpec

VERSION = "0.6.1"

_POLICY = "lerobot.policies.smolvla.modeling_smolvla"
_NETWORK = "lerobot.policies.smolvla.smolvlm_with_expert"
_CONFIG = "lerobot.policies.smolvla.configuration_smolvla"
_PROCESSORS = "lerobot.policies.smolvla.processor_smolvla"
_ALIAS = re.compile(r"^([ \t]*)type (\w+ =)", re.MULTILINE)
# `class Name[T](Base):`, `class Name[T]:` and `def name[T](`
_CLASS = re.compile(r"^([ \t]*class \w+)\[([^\]]+)\](?:\(([^)]*)\))?:", re.MULTILINE)
_FUNCTION = re.compile(r"^([ \t]*(?:async )?def \w+)\[([^\]]+)\]\(", re.MULTILINE)
# operators declared here stay declared as long as their library object lives
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Make `import lerobot` work in this process.

    Raises ImportError saying why LeRobot cannot be used.
    """
    if importlib.util.find_spec("lerobot") is None:
        raise ImportError("LeRobot is not installed")
    if sys.version_info < (3, 12) and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _let_torchvision_import()
    found = importlib.import_module("lerobot").__version__
    if found != VERSION:
        raise ImportError(f"LeRobot {found} is installed; the comparison is with {VERSION}")
    for name in (_POLICY, _NETWORK, _CONFIG, _PROCESSORS):
        importlib.import_module(name)


class _Finder(importlib.machinery.PathFinder):
    """Finds LeRobot's modules where they are, with a loader that rewrites them."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] != "lerobot":
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a file with bracketed type parameters as Python 3.11."""

    def exec_module(self, module: ModuleType) -> None:
        original = Path(self.path).read_text()
        source, parameters = without_pep695(original)
        if source == original:
            super().exec_module(module)
            return
        for name in parameters:
            setattr(module, name, TypeVar(name))  # pyright: ignore[reportGeneralTypeIssues]
        exec(compile(source, self.path, "exec", dont_inherit=True), vars(module))


def without_pep695(source: str) -> tuple[str, list[str]]:
    """Source in which aliases are assignments and type parameters free names, and those names."""
    parameters: list[str] = []

    def names(text: str) -> str:
        found = [each.partition(":")[0].strip() for each in text.split(",")]
        parameters.extend(found)
        return ", ".join(found)

    def class_line(match: re.Match[str]) -> str:
        head, inside, bases = match.groups()
        generic = f"__import__('typing').Generic[{names(inside)}]"
        return f"{head}({bases}, {generic}):" if bases else f"{head}({generic}):"

    def function_line(match: re.Match[str]) -> str:
        names(match.group(2))
        return f"{match.group(1)}("

    source = _FUNCTION.sub(function_line, _CLASS.sub(class_line, _ALIAS.sub(r"\1\2", source)))
    return source, list(dict.fromkeys(parameters))


def _let_torchvision_import() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")


# SmolVLA without the hub.

FAKE_IMAGE_TOKEN, GLOBAL_IMAGE_TOKEN = 121, 122


def vlm_config(vision: VisionSpec, text: DecoderSpec, scale: int, text_extra: Mapping[str, Any] | None = None) -> Any:
    """transformers' configuration of a SmolVLM of these sizes."""
    smolvlm = importlib.import_module("transformers").SmolVLMConfig
    text_config = {
        "model_type": "llama", "vocab_size": text.d_vocab, "hidden_size": text.d_model, "intermediate_size": text.d_mlp,
        "num_hidden_layers": text.n_layers, "num_attention_heads": text.n_heads, "head_dim": text.d_head,
        "num_key_value_heads": text.n_kv_heads, "rms_norm_eps": text.eps, "hidden_act": text.act, "pad_token_id": 2,
    }  # fmt: skip
    vision_config = {
        "hidden_size": vision.d_model, "intermediate_size": vision.d_mlp, "num_hidden_layers": vision.n_layers,
        "num_attention_heads": vision.n_heads, "image_size": vision.image_size, "patch_size": vision.patch_size,
        "layer_norm_eps": vision.eps, "hidden_act": vision.act,
    }  # fmt: skip
    return smolvlm(
        text_config=text_config | dict(text_extra or {}), vision_config=vision_config, scale_factor=scale,
        image_token_id=2, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


@contextmanager
def _without_hub(vlm: Any, expert_d_mlp: int | None) -> Iterator[None]:
    """LeRobot is given `vlm` where it would ask the hub for the language model's configuration.

    expert_d_mlp: in place of LeRobot's rule for the width of the expert's feed-forward network.
    """
    network: Any = importlib.import_module(_NETWORK)
    special = SimpleNamespace(fake_image_token_id=FAKE_IMAGE_TOKEN, global_image_token_id=GLOBAL_IMAGE_TOKEN)
    processor = SimpleNamespace(tokenizer=special)
    d_mlp = network.get_intermediate_size if expert_d_mlp is None else lambda *_: expert_d_mlp
    with (
        mock.patch.object(network, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: vlm)),
        mock.patch.object(network, "AutoProcessor", SimpleNamespace(from_pretrained=lambda *_, **__: processor)),
        mock.patch.object(network, "get_intermediate_size", d_mlp),
    ):
        yield


def make_policy(
    vlm: Any,
    cameras: Mapping[str, tuple[int, int]],
    d_state: int,
    d_action: int,
    seed: int | None = 0,
    expert_d_mlp: int | None = None,
    **config: Any,
) -> Any:
    """LeRobot's policy with random weights; cameras: batch key -> (height, width).

    seed: of the draw that replaces LeRobot's own (norms of 1 and biases of 0 would hide errors), None to keep that.
    """
    types: Any = importlib.import_module("lerobot.configs.types")
    visual = {key: types.PolicyFeature(types.FeatureType.VISUAL, (3, *size)) for key, size in cameras.items()}
    state = types.PolicyFeature(types.FeatureType.STATE, (d_state,))
    action = types.PolicyFeature(types.FeatureType.ACTION, (d_action,))
    policy_config: Any = importlib.import_module(_CONFIG).SmolVLAConfig(
        input_features=visual | {"observation.state": state},
        output_features={"action": action},
        device="cpu",
        load_vlm_weights=False,
        vlm_model_name="./vlm",
        **config,
    )
    with _without_hub(vlm, expert_d_mlp):
        policy: Any = importlib.import_module(_POLICY).SmolVLAPolicy(policy_config)
    if seed is not None:
        redraw(policy, seed)
    return policy.eval()


def policy_around(model: HookedVLA) -> Any:
    """LeRobot's policy with the sizes of our model, sharing its weights."""
    spec = model.spec
    assert isinstance(spec, FlowVLASpec) and spec.features.resize is not None
    width, height = spec.features.resize
    policy = make_policy(
        vlm_config(spec.vision, spec.vlm, spec.connector.scale),
        {image_key(camera): (height, width) for camera in spec.features.cameras},
        spec.features.d_state,
        spec.features.d_action,
        seed=None,
        expert_d_mlp=spec.expert.decoder.d_mlp,
        chunk_size=spec.flow.chunk,
        n_action_steps=spec.features.n_action_steps,
        max_state_dim=spec.flow.d_state,
        max_action_dim=spec.flow.d_action,
        num_steps=spec.flow.n_steps,
        min_period=spec.flow.min_period,
        max_period=spec.flow.max_period,
        num_vlm_layers=spec.vlm.n_layers,
        expert_width_multiplier=spec.expert.decoder.d_model / spec.vlm.d_model,
        resize_imgs_with_padding=spec.features.resize,
    )
    policy.load_state_dict(model.public_state_dict(), strict=True, assign=True)
    return policy


@torch.no_grad()
def redraw(module: torch.nn.Module, seed: int) -> None:
    """New weights: matrices keep the size of what passes through them, vectors stay near their mean."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(parameter.mean() + 0.1 * values)
        else:
            parameter.copy_(values * parameter[0].numel() ** -0.5)


def save_policy(policy: Any, vlm: Any, folder: Path) -> None:
    """The policy in its public layout, the language model's configuration beside it."""
    policy.save_pretrained(folder)
    vlm.save_pretrained(folder / "vlm")


def load_policy(folder: Path, vlm: Any, expert_d_mlp: int | None = None) -> Any:
    """LeRobot's policy from a folder; a key that is missing or unexpected raises RuntimeError."""
    with _without_hub(vlm, expert_d_mlp):
        return importlib.import_module(_POLICY).SmolVLAPolicy.from_pretrained(folder, strict=True)


def make_processors(policy: Any, statistics: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Any]:
    """LeRobot's preprocessor (tokenizer and normaliser) and postprocessor (un-normaliser) of a policy."""
    return importlib.import_module(_PROCESSORS).make_smolvla_pre_post_processors(policy.config, statistics)


def modes(names: Mapping[str, str]) -> dict[str, Any]:
    """A normalisation mapping in LeRobot's type: {"STATE": "MEAN_STD", ...}."""
    types: Any = importlib.import_module("lerobot.configs.types")
    return {feature: types.NormalizationMode(name) for feature, name in names.items()}
