"""Parts of a model in PyTorch files of their own, `<part>--<step>_checkpoint.pt`, as OpenVLA-OFT saves them.

Only tensors are read from such a file, never code. Low-rank updates that are stored beside a weight (PEFT's layout)
are added to it when it is read.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAME = re.compile(r"(?P<part>\w+)--\w+_checkpoint\.pt")
PATTERN = "*--*_checkpoint.pt"
_UPDATE = re.compile(r"(.+)\.lora_([AB])\.\w+\.weight")
# OpenVLA-OFT: vla-scripts/finetune.py, LoraConfig(lora_alpha=min(lora_rank, 16))
_MAX_ALPHA = 16


def part_files(folder: Path) -> dict[str, Path]:
    """Part -> its file.

    Raises ValueError when a part has more than one.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(PATTERN)):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        part = match["part"]
        if part in found:
            raise ValueError(f"two files for {part!r} in {folder}: {found[part].name}, {path.name}; keep one")
        found[part] = path
    return found


def save_part(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a part's file; it appears when complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, temporary)
    temporary.replace(path)


class PartFile:
    """The tensors of a part, memory-mapped where the file allows it."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that is damaged, or that holds anything but tensors by name."""
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is truncated, or not a file of tensors alone: {reason}") from error
        if not isinstance(stored, Mapping) or not all(isinstance(each, Tensor) for each in stored.values()):
            raise ValueError(f"{path} does not hold tensors by name")
        self._tensors: dict[str, Tensor] = {}
        self._updates: dict[str, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            match = _UPDATE.fullmatch(key)
            if match is None:
                self._tensors[key.replace(".base_layer.", ".")] = tensor
            else:
                self._updates.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, its low-rank update added: W + (alpha / rank) B A."""
        tensor, update = self._tensors[key], self._updates.get(key)
        if update is None:
            return tensor
        rank = update["A"].shape[0]
        added = update["B"].float() @ update["A"].float() * (min(rank, _MAX_ALPHA) / rank)
        return (tensor.float() + added).to(tensor.dtype)
