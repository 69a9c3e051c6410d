"""Checkpoints: finding and reading their files, and filling a network by a spec's key rules.

Every key of a checkpoint is used or known to be dropped, and every parameter is filled exactly once, or loading
raises with both lists. Tensors are read one at a time, so that no second copy of the model is ever held.
"""

import json
import logging
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from hooked_vla.models.network import expand_ties, share_parameters
from hooked_vla.part_files import PATTERN, PartFile, part_files
from hooked_vla.spec import KeyTarget, Split, Transposed

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# the trained policies that come with the package, each a folder in its public layout
SHIPPED = Path(__file__).parent / "zoo"
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
    """What loading did with the checkpoint's keys: our parameter -> its source, keys dropped, statistics found."""

    loaded: "Mapping[str, Source]"
    dropped: tuple[str, ...]
    statistics: tuple[str, ...]


class Checkpoint:
    """A folder in a public layout, its tensors listed by key but not read.

    Those of `<part>--<step>_checkpoint.pt` files have keys `<part>/<key>`; `parts` has the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = self.json("config.json")
        if config is None:
            raise FileNotFoundError(f"no config.json in {folder}")
        self.config = config
        self.tensors: dict[str, StoredTensor] = {}
        for file, wanted in self._weight_files().items():
            stored = _list_tensors(file)
            missing = sorted(set(wanted or ()) - set(stored))
            if missing:
                raise ValueError(f"{INDEX} says that {file.name} holds {missing[:10]}, but it does not")
            for key in stored if wanted is None else wanted:
                # torch.compile leaves its wrapper's name in saved keys
                self.tensors[key.replace("_orig_mod.", "")] = StoredTensor(file, key, stored[key])
        self._open: dict[Path, Any] = {}
        self.parts = part_files(folder)
        for part, file in self.parts.items():
            opened = self._open[file] = PartFile(file)
            for key, shape in opened.shapes().items():
                self.tensors[f"{part}/{key}"] = StoredTensor(file, key, shape)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None where there is none.

        Raises ValueError when the file is not a JSON object.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
        return content

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
        opened = self._open[stored.file]
        return opened.read(stored.key) if isinstance(opened, PartFile) else opened.get_tensor(stored.key)

    def sidecars(self) -> dict[str, bytes]:
        """The folder's small files by relative path: everything but the weights."""
        paths = {path for pattern in SIDECARS for path in self.folder.glob(pattern) if path.is_file()}
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in sorted(paths) if path.name != INDEX}

    def _weight_files(self) -> dict[Path, list[str] | None]:
        """Weight files and the keys that are theirs; None for all that a file holds."""
        index = self.json(INDEX)
        if index is None:
            files: dict[str, list[str] | None] = {WEIGHTS: None}
        elif isinstance(index.get("weight_map"), dict):
            files = {}
            for name in set(index["weight_map"].values()):
                files[name] = [key for key, file in index["weight_map"].items() if file == name]
        else:
            raise ValueError(f"{self.folder / INDEX} has no weight_map")
        missing = sorted(name for name in files if not (self.folder / name).is_file())
        if missing:
            raise FileNotFoundError(f"missing weight files in {self.folder}: {missing}")
        return {self.folder / name: keys for name, keys in files.items()}


def remove_leftovers(folder: Path, written: Container[str]) -> None:
    """Remove what another checkpoint left beside one that was just written: shards, their index, processor files."""
    index = folder / INDEX
    if index.is_file():
        shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
        for name in [INDEX, *shards]:
            if name not in written:
                (folder / name).unlink(missing_ok=True)
    for path in [*folder.glob("policy_*.json"), *folder.glob("policy_*.safetensors")]:
        if path.name not in written:
            path.unlink()


def _list_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def shipped_policies() -> list[str]:
    """Names of the trained policies that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{WEIGHTS}"))


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """A checkpoint from a folder, from the package by its name, or from the Hugging Face hub by its id.

    Raises FileNotFoundError when it is none of them.
    """
    folder = SHIPPED / str(path_or_id) if path_or_id in shipped_policies() else Path(path_or_id)
    if not folder.is_dir():
        try:
            patterns = [*SIDECARS, "*.safetensors", PATTERN]
            folder = Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))
        except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{str(path_or_id)!r} is neither a folder nor a checkpoint that the hub gave: {error}\n"
                f"policies that come with the package: {shipped_policies()}"
            ) from error
    return Checkpoint(folder)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a checkpoint key, one of its equal parts, or its transpose."""

    key: str
    part: int = 0
    n_parts: int = 1
    transposed: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of the parameter that a tensor of shape `whole` fills."""
        if self.transposed:
            return (*whole[:-2], whole[-1], whole[-2])
        return (whole[0] // self.n_parts, *whole[1:]) if self.n_parts > 1 else tuple(whole)

    def take(self, whole: Tensor) -> Tensor:
        """The parameter's values."""
        if self.transposed:
            return whole.transpose(-1, -2).contiguous()
        return whole.chunk(self.n_parts)[self.part].clone() if self.n_parts > 1 else whole


class KeyRules:
    """A spec's key table, read forwards (checkpoint key to parameters) and backwards."""

    def __init__(self, table: Mapping[str, Mapping[str, KeyTarget]]) -> None:
        # (regular expression of the key, its canonical form, our alternatives as (name, source without key))
        self._rules: list[tuple[re.Pattern[str], _Canonical, list[tuple[str, Source]], bool]] = []
        for prefixes, rules in table.items():
            spellings = prefixes.split("|")
            for pattern, target in rules.items():
                starts = "|".join(_regex(spelling) for spelling in spellings)
                targets, together = _targets(target)
                canonical = _Canonical(spellings[0] + pattern)
                self._rules.append((re.compile(f"(?:{starts}){_regex(pattern)}"), canonical, targets, together))

    def find(self, key: str, parameters: Container[str]) -> list[tuple[str, Source]] | None:
        """The parameters that a key fills; [] for a key to drop, None for one that no rule or parameter explains.

        Raises ValueError when two rules claim the key.
        """
        found = [(match, rule) for rule in self._rules if (match := rule[0].fullmatch(key))]
        if len(found) > 1:
            raise ValueError(f"{len(found)} key rules claim {key!r}")
        if not found:
            return None
        match, (_, canonical, targets, together) = found[0]
        if not targets:
            return []
        numbers = canonical.ours(match.groups())
        named = [(name.format(*numbers), replace(source, key=key)) for name, source in targets]
        present = [(name, source) for name, source in named if name in parameters]
        return (present if together else present[:1]) or None

    def public_sources(self, parameters: Iterable[str]) -> dict[str, Source]:
        """Parameter -> its place in the public layout; parameters that the layout lacks are left out."""
        by_pattern = {name: (canonical, source) for _, canonical, targets, _ in self._rules for name, source in targets}
        found = {}
        for name in parameters:
            parts = name.split(".")
            pattern = ".".join("{}" if part.isdigit() else part for part in parts)
            if pattern in by_pattern or name in by_pattern:
                canonical, source = by_pattern.get(name) or by_pattern[pattern]
                numbers = [part for part in parts if part.isdigit()]
                found[name] = replace(source, key=canonical.key(numbers))
        return found


_NUMBER = re.compile(r"\{(\+\d+)?\}")


def _regex(pattern: str) -> str:
    """Regular expression of a key pattern: "{}" and "{+1}" match numbers."""
    literals = _NUMBER.split(pattern)[::2]
    return r"(\d+)".join(map(re.escape, literals))


class _Canonical:
    """A key in the spelling that is written; "{+1}" in it is a number that counts from 1 where ours counts from 0."""

    def __init__(self, pattern: str) -> None:
        self.shifts = [int(shift or 0) for shift in _NUMBER.findall(pattern)]
        self.pattern = _NUMBER.sub("{}", pattern)

    def ours(self, numbers: Sequence[str]) -> list[int]:
        return [int(number) - shift for number, shift in zip(numbers, self.shifts, strict=True)]

    def key(self, numbers: Sequence[str]) -> str:
        if not self.shifts:
            return self.pattern
        return self.pattern.format(*(int(n) + shift for n, shift in zip(numbers, self.shifts, strict=True)))


def _targets(target: KeyTarget) -> tuple[list[tuple[str, Source]], bool]:
    """Our names of a rule, and whether they are filled together rather than alternatives."""
    if isinstance(target, Split):
        n = len(target.targets)
        return [(name, Source("", part, n)) for part, name in enumerate(target.targets)], True
    if isinstance(target, Transposed):
        return [(target.target, Source("", transposed=True))], False
    names = (target,) if isinstance(target, str) else target or ()
    return [(name, Source("")) for name in names], False


def plan_loading(
    rules: KeyRules,
    shapes: Mapping[str, Sequence[int]],
    parameters: Mapping[str, Sequence[int]],
    tied: Container[str] = (),
) -> tuple[dict[str, Source], list[str]]:
    """Which checkpoint tensor fills which parameter, and which keys are dropped; shapes by name on both sides.

    Parameters in `tied` may stay unfilled.
    Raises ValueError listing keys that nothing explains, parameters that nothing fills and shapes that differ.
    """
    filled: dict[str, Source] = {}
    dropped, problems, misfits = [], [], set()
    for key, shape in shapes.items():
        targets = rules.find(key, parameters)
        if targets is None:
            problems.append(f"unexpected key {key}")
            continue
        if not targets:
            dropped.append(key)
        for name, source in targets:
            if name in filled:
                problems.append(f"{key} and {filled[name].key} both fill {name}")
            elif source.shape(shape) != tuple(parameters[name]):
                problems.append(f"{key} has shape {list(shape)}, but {name} needs {list(parameters[name])}")
                misfits.add(name)
            else:
                filled[name] = source
    missing = [name for name in parameters if name not in filled and name not in misfits and name not in tied]
    public = rules.public_sources(missing)
    problems += [f"missing key {public[name].key if name in public else '?'} for {name}" for name in missing]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"the checkpoint does not fit the model, {len(problems)} problems:\n  {shown}")
    return filled, dropped


def fill_network(
    net: nn.Module,
    plan: Mapping[str, Source],
    checkpoint: Checkpoint,
    place: Callable[[str], tuple[torch.device, torch.dtype]],
    tied: Mapping[str, str],
) -> None:
    """Put every tensor of the plan where `place(name)` says, one tensor at a time; then share what is tied."""
    for name in tqdm(plan, desc="loading", unit="tensor", delay=2, leave=False):
        device, dtype = place(name)
        value = plan[name].take(checkpoint.read(plan[name].key))
        value = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        module, leaf = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module.register_parameter(leaf, nn.Parameter(value))
    share_parameters(net, {name: other for name, other in tied.items() if name not in plan})


def public_state_dict(net: nn.Module, rules: KeyRules, tied: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A network's tensors under their keys in the public layout; what is still `tied` is left out."""
    ties = expand_ties(tied or {}, net.state_dict())
    ours = {
        name: value for name, value in net.state_dict(keep_vars=True).items()
        if name not in ties or value is not net.get_parameter(ties[name])
    }  # fmt: skip
    parts: dict[str, dict[int, Tensor]] = {}
    for name, source in rules.public_sources(ours).items():
        value = ours[name].detach()
        parts.setdefault(source.key, {})[source.part] = value.transpose(-1, -2) if source.transposed else value
    return {
        key: each[0] if len(each) == 1 else torch.cat([each[i] for i in sorted(each)]) for key, each in parts.items()
    }
