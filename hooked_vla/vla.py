"""HookedVLA: a policy as its public implementation offers it, with every activation named and within reach."""

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_vla import lerobot, registry
from hooked_vla.folders import write_file
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.hooks.model import HookedModel
from hooked_vla.inputs import Actions, Draws, ModelInputs, Observation, Segments, StepInputs
from hooked_vla.interventions import Compiled, Edits, EditSet
from hooked_vla.models.network import Network, expand_ties
from hooked_vla.part_files import save_part
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
    remove_leftovers,
)

logger = logging.getLogger(__name__)

Batch = Observation | Mapping[str, Any] | ModelInputs


class HookedVLA(HookedModel):
    """A vision-language-action policy with hook points; made by `from_pretrained` or `from_spec`.

    `model(obs)` and the `run_with_...` methods follow the ambient grad mode; `predict_action_chunk` and
    `select_action` never record gradients. Hooks work the same through all of them.

    sidecars: the checkpoint's small files by name, beside config.json and weights; statistics: the tensors among its
    weights that normalise, by key. Both are saved again as they were loaded.
    """

    net: Network

    def __init__(self, spec: ModelSpec, net: Network, processor: Processor) -> None:
        super().__init__(net)
        self.spec = spec
        self.processor = processor
        self.load_report: LoadReport | None = None
        self.sidecars: dict[str, bytes] = {}
        self.statistics: dict[str, Tensor] = {}
        self._part_files: dict[str, str] = {}
        self._queue: deque[Tensor] = deque()
        self._history: list[StepInputs] = []
        self._compiled: Compiled | None = None

    @classmethod
    def from_spec(
        cls, name: str, size: str = "full", seed: int = 0, device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
    ) -> "HookedVLA":  # fmt: skip
        """A model with random weights: the published size, or "tiny" with the same wiring.

        Raises ValueError for an unknown name or size.
        """
        spec = registry.get_spec(name, size)
        place, dtype = _device(device), _dtype(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = registry.build_network(spec)
        for parameter_name, parameter in net.named_parameters():
            parameter.data = parameter.data.to(place, _parameter_dtype(parameter_name, spec, dtype))
        for buffer_name, buffer in net.named_buffers():
            wanted = _parameter_dtype(buffer_name, spec, dtype) if buffer.is_floating_point() else buffer.dtype
            buffer.data = buffer.data.to(place, wanted)
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
        dtype: str | torch.dtype = torch.float32,
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
        dtype = _dtype(dtype)
        checkpoint = open_checkpoint(path_or_id, revision)
        announced = checkpoint.config.get("type", checkpoint.config.get("model_type"))
        base = registry.spec_for_config_type(announced, checkpoint.parts, checkpoint.tensors)
        spec = registry.family(base).read_spec(base, checkpoint)
        with init_empty_weights():
            net = registry.build_network(spec)
        statistics = lerobot.statistics_of_buffers(checkpoint.tensors, _feature_keys(checkpoint))
        shapes = {key: t.shape for key, t in checkpoint.tensors.items() if key not in statistics}
        parameters = {name: tensor.shape for name, tensor in net.state_dict().items()}
        ties = expand_ties(spec.tied, parameters)
        plan, dropped = plan_loading(KeyRules(spec.keys), shapes, parameters, ties)
        devices = _device_map(net, device_map, device, dtype)
        fill_network(
            net, plan, checkpoint,
            lambda name: (_lookup(devices, name), _parameter_dtype(name, spec, dtype)), ties,
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
        model.sidecars, model.statistics = sidecars, stored
        model._part_files = {part: file.name for part, file in checkpoint.parts.items()}
        model.load_report = LoadReport(plan, tuple(dropped), tuple(statistics))
        if dropped:
            logger.warning("dropped %d checkpoint keys that the policy does not use: %s", len(dropped), dropped)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint in its public layout, with geometry.json; each file appears when complete.

        What another checkpoint left in the folder (shards and their index, processor files) is removed.
        Raises ValueError for a model whose weights are offloaded.
        """
        away = sorted({name.split(".")[0] for name, tensor in self.net.named_parameters() if tensor.is_meta})
        if away:
            raise ValueError(f"the weights of {away} are not in memory; load without offloading to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = registry.family(self.spec).write_config(self.spec)
        files = {"config.json": json.dumps(config, indent=2).encode()} | self.sidecars
        files["geometry.json"] = json.dumps(self.spec.geometry(), indent=1).encode()
        for name, content in files.items():
            write_file(folder / name, content)
        parts: dict[str, dict[str, Tensor]] = {"": {}}
        for key, tensor in (self.public_state_dict() | self.statistics).items():
            part, _, rest = key.rpartition("/")
            parts.setdefault(part, {})[rest] = tensor
        tensors = parts.pop("")
        for part, each in parts.items():
            save_part(folder / self._part_files.get(part, f"{part}--latest_checkpoint.pt"), each)
        write_safetensors(
            folder / WEIGHTS,
            [(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in sorted(tensors.items())],
            {"format": "pt"},
        )
        remove_leftovers(folder, {*files, WEIGHTS})

    def public_state_dict(self) -> dict[str, Tensor]:
        """The parameters under their keys in the public layout."""
        return public_state_dict(self.net, KeyRules(self.spec.keys), self.spec.tied)

    # What HookedModel asks.

    def prepare_raw(self, obs: Batch, unnorm_key: str | None = None) -> tuple[ModelInputs, bool]:
        inputs, raw = self._processor(unnorm_key)(obs, self.device)
        # inputs that were prepared before remember where they came from
        return (inputs, inputs.raw) if isinstance(obs, ModelInputs) else (replace(inputs, raw=raw), raw)

    def act(self, inputs: ModelInputs, noise: Any, raw: bool, unnorm_key: str | None = None) -> Actions:
        # copies: what the caller does to its actions must not reach a cache
        padded = self._sample(inputs, noise).clone()
        chunk, normalized = self._processor(unnorm_key).actions(padded, raw)
        return Actions(chunk, normalized)

    def _processor(self, unnorm_key: str | None) -> Processor:
        return self.processor if unnorm_key is None else self.processor.with_key(unnorm_key)

    def segments(self, inputs: ModelInputs) -> Mapping[str, Segments]:
        """Token segments of every stream for these inputs: "vision", "connector", "vlm", "expert", ..."""
        return {stream: each.to(self.device) for stream, each in self.net.segments(inputs).items()}

    @property
    def dead_ends(self) -> Sequence[str]:
        return self.net.dead_ends

    @property
    def n_denoise_steps(self) -> int:
        return self.net.n_denoise_steps

    # Edits, and compiled runs under them.

    @contextmanager
    def edits(self, edits: Edits | EditSet) -> Iterator[EditSet]:
        """Edits for the block only, whatever ends it; in it, every entry point runs under them.

        edits: in the order in which they act, or a list of them for each row of the batch, or an EditSet, which is what
        the block gets: `set` changes strengths, sources, tokens and the like between forward passes.
        Raises and warns as EditSet, before anything runs; at the end of the block, RuntimeError when the model ran and
        an edit came upon no value.
        """
        edit_set = edits if isinstance(edits, EditSet) else EditSet(self, edits)
        if edit_set.model is not self:
            raise ValueError("this EditSet was made for another model")
        with edit_set.attached():
            yield edit_set

    def compile(self, mode: str = "exact") -> Compiled:
        """Run `sample_actions` compiled from now on, through every entry point, until the returned handle's `remove`.

        mode: "exact": as eager has it, bit for bit on a CPU; through Inductor there, as a CUDA graph on a GPU. "fused":
        Inductor fuses what it can: faster, other last bits.
        What is attached by `edits` is compiled in; changing it by `EditSet.set`, or the environment step, compiles
        nothing anew. While other hooks are attached, or gradients recorded, the model runs uncompiled.
        Raises as Compiled; RuntimeError at the first run of a model whose next operation depends on what it computed.
        """
        if self._compiled is not None:
            self._compiled.remove()
        self._compiled = Compiled(self, self._sample_plainly, mode, self._forget_compiled)
        return self._compiled

    def _forget_compiled(self) -> None:
        self._compiled = None

    # The public policy's own entry points.

    def sample_actions(self, inputs: ModelInputs, noise: Any = None) -> Float[Tensor, "batch step d_padded"]:
        """The network alone: tensors in, normalised actions at the padded width out; this is what compiles."""
        outer = self.run_state.begin(lambda: self.segments(inputs))
        try:
            if not torch.compiler.is_compiling():
                self._begin(inputs)
            return self._sample(inputs, noise)
        finally:
            self.run_state.end(outer)

    def _sample(self, inputs: ModelInputs, noise: Any) -> Tensor:
        if self._compiled is None or torch.compiler.is_compiling():
            return self._sample_plainly(inputs, noise)
        return self._compiled(inputs, noise)

    def _sample_plainly(self, inputs: ModelInputs, noise: Any) -> Tensor:
        draws = Draws(noise, self.device)
        actions = self.net.sample_actions(inputs, draws, self.run_state)
        draws.check_used_up()
        return actions

    def training_loss(
        self,
        inputs: ModelInputs,
        actions: Float[Tensor, "batch step d_action"],
        valid: Bool[Tensor, "batch step"] | None = None,
        noise: Any = None,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """Each row's loss under the model's own published objective, by `Network.training_loss`; hooks work as
        everywhere, and gradients follow the ambient grad mode.

        actions: normalised targets. valid: which steps count. noise: every draw in order, fresh where None.
        Raises ValueError for targets or draws of another shape, TypeError for a model that is not trained on actions.
        """
        actions = actions.to(self.device, torch.float32)
        valid = None if valid is None else valid.to(self.device)
        outer = self.run_state.begin(lambda: self.segments(inputs))
        try:
            if not torch.compiler.is_compiling():
                self._begin(inputs)
            draws = Draws(noise, self.device)
            losses = self.net.training_loss(inputs, actions, valid, draws, self.run_state, n_draws)
            draws.check_used_up()
            return losses
        finally:
            self.run_state.end(outer)

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Batch, noise: Any = None, unnorm_key: str | None = None, edits: Edits | EditSet = ()
    ) -> Float[Tensor, "batch step d_action"]:
        """A whole action chunk, for an Observation or the public policy's own batch; edits: for this run.

        In the robot's units for raw observations; for a batch that already went through the checkpoint's
        preprocessor (it carries token ids) normalised, unless the public policy un-normalises those too.
        """
        return self(batch, noise, unnorm_key, edits).chunk

    @torch.no_grad()
    def generate_action_tokens(
        self, batch: Batch, max_new_tokens: int | None = None, unnorm_key: str | None = None
    ) -> Int[Tensor, "batch token"]:
        """Ids of the action tokens that the model generates, before they become actions; hooks work as everywhere.

        max_new_tokens: None for as many as an action chunk takes.
        Raises TypeError for a model that does not generate tokens.
        """
        inputs = self.prepare(batch, unnorm_key)
        with self.running(inputs):
            return self.net.generate_action_tokens(inputs, max_new_tokens, self.run_state)

    @torch.no_grad()
    def select_action(
        self, batch: Batch, noise: Any = None, unnorm_key: str | None = None, edits: Edits | EditSet = ()
    ) -> Float[Tensor, "batch d_action"]:
        """The next action: from the queue, or from a new chunk of which n_action_steps are queued.

        While actions are queued the model does not run, so hooks do not fire. edits: act where a new chunk is made.
        A policy that sees several observation steps remembers those of the calls since `reset`; the first one stands
        for those before it.
        Raises ValueError when the batch has another size than the queued actions.
        """
        if self._queue and (rows := _batch_rows(batch)) != len(self._queue[0]):
            raise ValueError(
                f"the queued actions are for {len(self._queue[0])} rows, the batch has {rows}: reset() first"
            )
        features = self.spec.features
        if self._queue and features.n_obs_steps == 1:
            return self._queue.popleft()
        inputs, raw = self.prepare_raw(batch, unnorm_key)
        if isinstance(inputs, StepInputs) and features.n_obs_steps > 1:
            self._history.extend([inputs] * (features.n_obs_steps if not self._history else 1))
            self._history = self._history[-features.n_obs_steps :]
            inputs = inputs.follow(self._history[:-1])
        if not self._queue:
            with self._under(edits):
                chunk = self._run(inputs, raw, noise, unnorm_key).chunk
            self._queue.extend(chunk[:, : features.n_action_steps].unbind(1))
        return self._queue.popleft()

    def reset(self) -> None:
        """Forget queued actions and past observations; call it when an episode starts."""
        self._queue.clear()
        self._history = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedVLA":
        # .to(dtype), .bfloat16() and so on leave in float32 what the public implementation keeps there
        islands = {
            name: parameter.detach()
            for name, parameter in self.net.named_parameters()
            if _parameter_dtype(name, self.spec, torch.int8) == parameter.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        for name, before in islands.items():
            parameter = self.net.get_parameter(name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first weights that are in memory."""
        places = (parameter.device for parameter in self.net.parameters() if not parameter.is_meta)
        return next(places, torch.device("cpu"))


def _feature_keys(checkpoint: Checkpoint) -> list[str]:
    return [*(checkpoint.config.get("input_features") or {}), *(checkpoint.config.get("output_features") or {})]


def _batch_rows(batch: Batch) -> int:
    """Rows of an observation or batch, before preprocessing."""
    if isinstance(batch, ModelInputs):
        return batch.batch_size
    if isinstance(batch, Observation):
        return 1 if np.ndim(batch.state) == 1 else len(batch.state)
    return next((len(value) for value in batch.values() if isinstance(value, Tensor)), 1)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch dtype or its name, got {dtype!r}")
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is unknown or not available here: {error}") from error
    return place


def _parameter_dtype(name: str, spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    # "{}" in spec.fp32 stands for a number, as in the key rules
    found = any(re.match(re.escape(module).replace(r"\{\}", r"\d+") + r"\.", name) for module in spec.fp32)
    return torch.float32 if found else dtype


def _device_map(
    net: nn.Module, device_map: str | Mapping[str, Any] | None, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    if device_map is None:
        return {"": _device(device)}
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f'device_map must be "auto" or a mapping of module names to devices, got {device_map!r}')
        whole = ["Block", "TowerBlock", "PostNormBlock", "ConvBlock", "ConditionedBlock", "DeepstackBlock"]
        return dict(infer_auto_device_map(net, no_split_module_classes=whole, dtype=dtype))
    return dict(device_map)


def _lookup(devices: Mapping[str, Any], name: str) -> torch.device:
    prefixes = [module for module in devices if not module or name == module or name.startswith(f"{module}.")]
    if not prefixes:
        raise ValueError(f"device_map says nothing about {name}; it has {sorted(devices)}")
    place = devices[max(prefixes, key=len)]
    return torch.device("cpu") if place == "disk" else _device(place)
