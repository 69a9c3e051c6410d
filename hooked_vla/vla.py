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
from hooked_vla.inputs import Actions, ModelInputs, Observation, Segments
from hooked_vla.policy import Normalizer, Processor, Tokenizer
from hooked_vla.spec import VLASpec
from hooked_vla.weights import WEIGHTS, Checkpoint, KeyRules, LoadReport, fill_network, open_checkpoint, plan_loading

logger = logging.getLogger(__name__)

Batch = Observation | Mapping[str, Any] | ModelInputs


class HookedVLA(HookedModel):
    """A vision-language-action policy with hook points; made by `from_pretrained` or `from_spec`.

    `model(obs)` and the `run_with_...` methods follow the ambient grad mode; `predict_action_chunk` and
    `select_action` never record gradients. Hooks work the same through all of them.
    """

    def __init__(self, spec: VLASpec, net: nn.Module, processor: Processor) -> None:
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
        return cls(spec, net.eval(), _processor(spec, None, {}, {}))

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
        assert checkpoint.config is not None
        base = registry.spec_for_config_type(checkpoint.config.get("type"))
        spec = registry.family(base).read_spec(base, checkpoint)
        with init_empty_weights():
            net = registry.build_network(spec)
        statistics = lerobot.statistics_of_buffers(checkpoint.tensors, _feature_keys(checkpoint))
        shapes = {key: t.shape for key, t in checkpoint.tensors.items() if key not in statistics}
        plan, dropped = plan_loading(
            KeyRules(spec.keys), shapes, {name: p.shape for name, p in net.named_parameters()}
        )
        devices = _device_map(net, device_map, device, dtype)
        fill_network(
            net, plan, checkpoint,
            lambda name: (_lookup(devices, name), _parameter_dtype(name, spec, dtype)),
        )  # fmt: skip
        if device_map is not None:
            net = dispatch_model(net, devices, offload_dir=offload_dir, force_hooks=True)
        sidecars = checkpoint.sidecars()
        stored = {key: checkpoint.read(key) for key in statistics}
        values: dict[str, dict[str, Tensor]] = {}
        for key, (feature, name) in statistics.items():
            values.setdefault(feature, {})[name] = stored[key]
        model = cls(spec, net.eval(), _processor(spec, checkpoint.folder, sidecars, values))
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
        ours = dict(self.net.named_parameters())
        keys = public_keys(self.spec, ours)
        return {keys[name]: parameter.detach() for name, parameter in ours.items()}

    # What HookedModel asks.

    def prepare(self, obs: Batch) -> ModelInputs:
        """Preprocess an observation or batch; inputs that are ready pass through."""
        return self._prepare(obs)[0]

    def act(self, inputs: ModelInputs, noise: Any) -> Actions:
        return self._actions(self.sample_actions(inputs, self._noise(inputs, noise)), raw=True)

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

    def sample_actions(
        self, inputs: ModelInputs, noise: Float[Tensor, "batch chunk d_action"]
    ) -> Float[Tensor, "batch chunk d_action"]:
        """The network alone: tensors in, normalised actions at the padded width out; this is what compiles."""
        return self.net.sample_actions(inputs, noise, self.run_state)

    def forward(self, obs: Batch, noise: Any = None) -> Actions:
        """One action chunk for an observation or batch.

        noise: the starting noise [batch, chunk, d_action], or a list with every random draw in order; None draws.
        """
        inputs, raw = self._prepare(obs)
        actions = self.run(inputs, noise)
        return actions if raw else Actions(actions.normalized, actions.normalized)

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
        """Where inputs go."""
        return next(self.net.parameters()).device

    def _prepare(self, obs: Batch) -> tuple[ModelInputs, bool]:
        return self.processor(obs, self.device)

    def _actions(self, padded: Tensor, raw: bool) -> Actions:
        chunk, normalized = self.processor.actions(padded, raw)
        return Actions(chunk, normalized)

    def _noise(self, inputs: ModelInputs, noise: Any) -> Tensor:
        flow = self.spec.flow
        shape = (inputs.batch_size, flow.chunk, flow.d_action)
        if noise is None:
            return torch.randn(shape, device=inputs.state.device)
        if not isinstance(noise, Tensor):
            if len(noise) != 1:
                raise ValueError(f"this policy draws noise once per chunk; got {len(noise)} draws")
            noise = torch.as_tensor(noise[0])
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must be [batch, chunk, d_action] = {list(shape)}, got {list(noise.shape)}")
        return noise.to(device=inputs.state.device, dtype=torch.float32)


def public_keys(spec: VLASpec, parameters: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Parameter name -> its key in the public layout, by the spec's key rules read backwards."""
    rules = KeyRules(spec.keys)
    keys = {}
    for prefix, table in spec.keys.items():
        for pattern, target in table.items():
            for each in (target,) if isinstance(target, str) else target or ():
                keys[each] = prefix + pattern
    found = {}
    for name in parameters:
        numbers = [part for part in name.split(".") if part.isdigit()]
        pattern = ".".join("{}" if part.isdigit() else part for part in name.split("."))
        found[name] = keys[pattern].format(*numbers)
        assert name in (rules.targets(found[name]) or ())
    return found


def _processor(
    spec: VLASpec, folder: Path | None, sidecars: Mapping[str, bytes], statistics: Mapping[str, Mapping[str, Tensor]]
) -> Processor:
    from safetensors.torch import load

    features = spec.features
    modes = {lerobot.image_key(c): features.normalization.get("VISUAL", "IDENTITY") for c in features.cameras}
    modes |= {lerobot.OBS_STATE: features.normalization.get("STATE", "IDENTITY")}
    modes |= {lerobot.ACTION: features.normalization.get("ACTION", "IDENTITY")}
    values = {key: dict(each) for key, each in statistics.items()}
    eps = Normalizer.eps
    for file in (lerobot.PREPROCESSOR, lerobot.POSTPROCESSOR):
        for step in lerobot.processor_steps(sidecars[file], file) if file in sidecars else []:
            if step.get("registry_name") not in ("normalizer_processor", "unnormalizer_processor"):
                continue
            eps = step["config"].get("eps", eps)
            if "state_file" in step:
                for name, value in load(sidecars[step["state_file"]]).items():
                    feature, _, statistic = name.rpartition(".")
                    values.setdefault(feature, {})[statistic] = value
    bare = [key for key, mode in modes.items() if mode != "IDENTITY" and key not in values]
    if bare and folder is not None:
        logger.warning("no statistics in the checkpoint for %s: their values pass unchanged", bare)
    assert spec.vlm.d_vocab is not None
    return Processor(
        features, Normalizer(modes, values, eps), Tokenizer(features, folder), spec.flow.d_state, spec.vlm.d_vocab
    )


def _feature_keys(checkpoint: Checkpoint) -> list[str]:
    assert checkpoint.config is not None
    return [*(checkpoint.config.get("input_features") or {}), *(checkpoint.config.get("output_features") or {})]


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is unknown or not available here: {error}") from error
    return place


def _parameter_dtype(name: str, spec: VLASpec, dtype: torch.dtype) -> torch.dtype:
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
    return torch.device("cpu") if place == "disk" else torch.device(place)
