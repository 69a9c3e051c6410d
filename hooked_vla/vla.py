"""HookedVLA: a policy as its public implementation offers it, with every activation named and within reach."""

import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla import lerobot, registry
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.hooks.model import HookedModel
from hooked_vla.inputs import Actions, Draws, ModelInputs, Observation, Segments
from hooked_vla.models.network import Network
from hooked_vla.policy import Processor
from hooked_vla.spec import ModelSpec
from hooked_vla.weights import (
    WEIGHTS,
    Checkpoint,
    KeyRules,
    LoadReport,
    fill_network,
    open_checkpoint,
    plan_loading,
    public_state_dict,
)

logger = logging.getLogger(__name__)

Batch = Observation | Mapping[str, Any] | ModelInputs


class HookedVLA(HookedModel):
    """A vision-language-action policy with hook points; made by `from_pretrained` or `from_spec`.

    `model(obs)` and the `run_with_...` methods follow the ambient grad mode; `predict_action_chunk` and
    `select_action` never record gradients. Hooks work the same through all of them.
    """

    net: Network

    def __init__(self, spec: ModelSpec, net: Network, processor: Processor) -> None:
        super().__init__(net)
        self.spec = spec
        self.processor = processor
        self.load_report: LoadReport | None = None
        self._sidecars: dict[str, bytes] = {}
        self._statistics: dict[str, Tensor] = {}
        self._queue: deque[Tensor] = deque()

    @classmethod
    def from_spec(
        cls, name: str, size: str = "full", seed: int = 0, device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "HookedVLA":  # fmt: skip
        """A model with random weights: the published size, or "tiny" with the same wiring.

        Raises ValueError for an unknown name or size.
        """
        spec = registry.get_spec(name, size)
        place = _device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = registry.build_network(spec)
        for parameter_name, parameter in net.named_parameters():
            parameter.data = parameter.data.to(place, _parameter_dtype(parameter_name, spec, dtype))
        return cls.from_network(spec, net.eval())

    @classmethod
    def from_network(cls, spec: ModelSpec, net: Network) -> "HookedVLA":
        """A model around a network of the spec, without a checkpoint's files."""
        return cls(spec, net, registry.processor_class(spec).from_files(spec, None, {}, {}))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        offload_dir: str | Path | None = None,
    ) -> "HookedVLA":
        """A public checkpoint, from a folder or from the hub.

        The architecture is recognised from config.json; sizes come from the checkpoint's files. dtype applies to
        all but the modules that the public implementation keeps in float32. device_map is accelerate's: "auto" or
        module name -> device, in place of `device`.
        Raises FileNotFoundError where there is no checkpoint, ValueError for one that is damaged, of an unknown
        family, or does not fit its own configuration, and for an unknown device.
        """
        checkpoint = open_checkpoint(path_or_id, revision)
        base = registry.spec_for_config_type(checkpoint.config.get("type"))
        spec = registry.family(base).read_spec(base, checkpoint)
        with init_empty_weights():
            net = registry.build_network(spec)
        statistics = lerobot.statistics_of_buffers(checkpoint.tensors, _feature_keys(checkpoint))
        shapes = {key: t.shape for key, t in checkpoint.tensors.items() if key not in statistics}
        parameters = {name: tensor.shape for name, tensor in net.state_dict().items()}
        plan, dropped = plan_loading(KeyRules(spec.keys), shapes, parameters, spec.tied)
        devices = _device_map(net, device_map, device, dtype)
        fill_network(
            net, plan, checkpoint,
            lambda name: (_lookup(devices, name), _parameter_dtype(name, spec, dtype)), spec.tied,
        )  # fmt: skip
        if device_map is not None:
            dispatch_model(net, devices, offload_dir=offload_dir, force_hooks=True)
        sidecars = checkpoint.sidecars()
        stored = {key: checkpoint.read(key) for key in statistics}
        values: dict[str, dict[str, Tensor]] = {}
        for key, (feature, name) in statistics.items():
            values.setdefault(feature, {})[name] = stored[key]
        processor = registry.processor_class(spec).from_files(spec, checkpoint.folder, sidecars, values)
        model = cls(spec, net.eval(), processor)
        model._sidecars, model._statistics = sidecars, stored
        model.load_report = LoadReport(plan, tuple(dropped), tuple(statistics))
        if dropped:
            logger.warning("dropped %d checkpoint keys that the policy does not use: %s", len(dropped), dropped)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint in its public layout, with geometry.json; each file appears when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = registry.family(self.spec).write_config(self.spec)
        files = {"config.json": json.dumps(config, indent=2).encode()} | self._sidecars
        files["geometry.json"] = json.dumps(self.spec.geometry(), indent=1).encode()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
        tensors = self.public_state_dict() | self._statistics
        write_safetensors(
            folder / WEIGHTS,
            [(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in sorted(tensors.items())],
            {"format": "pt"},
        )

    def public_state_dict(self) -> dict[str, Tensor]:
        """The parameters under their keys in the public layout."""
        return public_state_dict(self.net, KeyRules(self.spec.keys))

    # What HookedModel asks.

    def prepare_raw(self, obs: Batch) -> tuple[ModelInputs, bool]:
        return self.processor(obs, self.device)

    def act(self, inputs: ModelInputs, noise: Any, raw: bool) -> Actions:
        padded = self.sample_actions(inputs, noise)
        chunk, normalized = self.processor.actions(padded, raw)
        return Actions(chunk, normalized)

    def segments(self, inputs: ModelInputs) -> Mapping[str, Segments]:
        """Token segments of every stream for these inputs: "vision", "connector", "vlm", "expert", ..."""
        return self.net.segments(inputs)

    @property
    def dead_ends(self) -> Sequence[str]:
        return self.net.dead_ends

    @property
    def n_denoise_steps(self) -> int:
        return self.net.n_denoise_steps

    # The public policy's own entry points.

    def sample_actions(self, inputs: ModelInputs, noise: Any = None) -> Float[Tensor, "batch step d_padded"]:
        """The network alone: tensors in, normalised actions at the padded width out; this is what compiles."""
        draws = Draws(noise, self.device)
        actions = self.net.sample_actions(inputs, draws, self.run_state)
        draws.check_used_up()
        return actions

    @torch.no_grad()
    def predict_action_chunk(self, batch: Batch, noise: Any = None) -> Float[Tensor, "batch step d_action"]:
        """A whole action chunk, for an Observation or the public policy's own batch.

        In the robot's units for raw observations; for a batch that already went through the checkpoint's
        preprocessor (it carries token ids) normalised, as from the public policy.
        """
        return self(batch, noise).chunk

    @torch.no_grad()
    def select_action(self, batch: Batch, noise: Any = None) -> Float[Tensor, "batch d_action"]:
        """The next action: from the queue, or from a new chunk of which n_action_steps are queued."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise)
            self._queue.extend(chunk[:, : self.spec.features.n_action_steps].unbind(1))
        return self._queue.popleft()

    def reset(self) -> None:
        """Forget queued actions; call it when an episode starts."""
        self._queue.clear()

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first weights that are in memory."""
        places = (parameter.device for parameter in self.net.parameters() if not parameter.is_meta)
        return next(places, torch.device("cpu"))


def _feature_keys(checkpoint: Checkpoint) -> list[str]:
    return [*(checkpoint.config.get("input_features") or {}), *(checkpoint.config.get("output_features") or {})]


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is unknown or not available here: {error}") from error
    return place


def _parameter_dtype(name: str, spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith(tuple(f"{module}." for module in spec.fp32)) else dtype


def _device_map(
    net: nn.Module, device_map: str | Mapping[str, Any] | None, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    if device_map is None:
        return {"": _device(device)}
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f'device_map must be "auto" or a mapping of module names to devices, got {device_map!r}')
        return dict(infer_auto_device_map(net, no_split_module_classes=["Block"], dtype=dtype))
    return dict(device_map)


def _lookup(devices: Mapping[str, Any], name: str) -> torch.device:
    prefixes = [module for module in devices if not module or name == module or name.startswith(f"{module}.")]
    if not prefixes:
        raise ValueError(f"device_map says nothing about {name}; it has {sorted(devices)}")
    place = devices[max(prefixes, key=len)]
    return torch.device("cpu") if place == "disk" else _device(place)
