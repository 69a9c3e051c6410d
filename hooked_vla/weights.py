"""Checkpoints: finding and reading their files, and filling a network by a spec's key rules.

Every key of a checkpoint is used or known to be dropped, and every parameter is filled exactly once, or loading
raises with both lists. Tensors are read one at a time, so that no second copy of the model is ever held.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# small files that make a checkpoint whole: configuration, processors, tokenizers
SIDECARS = ("*.json", "*.txt", "*.model", "policy_*.safetensors", "*/config.json", "*/tokenizer*", "*/*.txt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint file, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What loading did with the checkpoint's keys: our parameter -> its key, keys dropped, statistics found."""

    loaded: Mapping[str, str]
    dropped: tuple[str, ...]
    statistics: tuple[str, ...]


class Checkpoint:
    """A folder in a public layout, its tensors listed by key but not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.json("config.json")
        if self.config is None:
            raise FileNotFoundError(f"no config.json in {folder}")
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            for key, shape in _list_tensors(file).items():
                # torch.compile leaves its wrapper's name in saved keys
                self.tensors[key.replace("_orig_mod.", "")] = StoredTensor(file, key, shape)
        self._open: dict[Path, Any] = {}

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None where there is none.

        Raises ValueError when the file is not JSON.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises ValueError naming the missing key.
        """
        if key not in self.tensors:
            raise ValueError(f"missing checkpoint key {key!r} in {self.folder}")
        return self.tensors[key].shape

    def read(self, key: str) -> Tensor:
        """One tensor, memory-mapped."""
        stored = self.tensors[key]
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(stored.file, framework="pt")
        return self._open[stored.file].get_tensor(stored.key)

    def sidecars(self) -> dict[str, bytes]:
        """The folder's small files by relative path: everything but the weights."""
        paths = {path for pattern in SIDECARS for path in self.folder.glob(pattern) if path.is_file()}
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in sorted(paths) if path.name != INDEX}

    def _weight_files(self) -> list[Path]:
        index = self.json(INDEX)
        names = [WEIGHTS] if index is None else sorted(set(index["weight_map"].values()))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"missing weight files in {self.folder}: {missing}")
        return [self.folder / name for name in names]


def _list_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """A checkpoint from a folder, or from the Hugging Face hub by its id.

    Raises FileNotFoundError when it is neither.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        try:
            patterns = [*SIDECARS, "*.safetensors"]
            folder = Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))
        except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{str(path_or_id)!r} is neither a folder nor a checkpoint that the hub gave: {error}"
            ) from error
    return Checkpoint(folder)


class KeyRules:
    """A spec's key table as a function from checkpoint key to candidate parameter names."""

    def __init__(self, table: Mapping[str, Mapping[str, str | tuple[str, ...] | None]]) -> None:
        self._rules: list[tuple[re.Pattern[str], tuple[str, ...]]] = []
        for prefix, rules in table.items():
            for pattern, target in rules.items():
                regex = re.escape(prefix + pattern).replace(r"\{\}", r"(\d+)")
                targets = (target,) if isinstance(target, str) else target or ()
                self._rules.append((re.compile(regex), targets))

    def targets(self, key: str) -> tuple[str, ...] | None:
        """Parameter names that the key may fill; () for a key to drop, None for a key that no rule knows.

        Raises ValueError when two rules claim the key.
        """
        found = [(match, targets) for rule, targets in self._rules if (match := rule.fullmatch(key))]
        if len(found) > 1:
            raise ValueError(f"{len(found)} key rules claim {key!r}")
        if not found:
            return None
        match, targets = found[0]
        return tuple(target.format(*match.groups()) for target in targets)


def plan_loading(
    rules: KeyRules, shapes: Mapping[str, Sequence[int]], parameters: Mapping[str, Sequence[int]]
) -> tuple[dict[str, str], list[str]]:
    """Which checkpoint key fills which parameter, and which keys are dropped; both arguments map names to shapes.

    Raises ValueError listing keys that nothing explains, parameters that nothing fills and shapes that differ.
    """
    filled: dict[str, str] = {}
    dropped, problems = [], []
    for key, shape in shapes.items():
        targets = rules.targets(key)
        if targets == ():
            dropped.append(key)
            continue
        target = next((t for t in targets or () if t in parameters), None)
        if target is None:
            problems.append(f"unexpected key {key}")
        elif target in filled:
            problems.append(f"{key} and {filled[target]} both fill {target}")
        elif tuple(shape) != tuple(parameters[target]):
            problems.append(f"{key} has shape {list(shape)}, but the model needs {list(parameters[target])}")
        else:
            filled[target] = key
    taken = {problem.split(" ")[0] for problem in problems}
    problems += [f"missing key for {name}" for name in parameters if name not in filled and name not in taken]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"the checkpoint does not fit the model, {len(problems)} problems:\n  {shown}")
    return filled, dropped


def fill_network(
    net: nn.Module,
    plan: Mapping[str, str],
    checkpoint: Checkpoint,
    place: Callable[[str], tuple[torch.device, torch.dtype]],
) -> None:
    """Put every tensor of the plan where `place(parameter name)` says, one tensor at a time."""
    for name in tqdm(plan, desc="loading", unit="tensor", delay=2, leave=False):
        device, dtype = place(name)
        module = net.get_submodule(name.rpartition(".")[0])
        value = checkpoint.read(plan[name]).to(device=device, dtype=dtype)
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(value))
