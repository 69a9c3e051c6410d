"""Tensors inside edits: copied, equal by content, and in JSON either a small list or a reference with a digest."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

# float32 tensors of so many numbers or fewer stand in the JSON itself
INLINE = 64

Numbers = Sequence[Any] | float | int


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Values:
    """A tensor that is part of an edit. It is a copy, and two are equal when dtype, shape and numbers are."""

    def __init__(self, given: "Tensor | Numbers | Values", what: str) -> None:
        """given: a floating-point tensor, or numbers, which become float32. what: what messages call it.

        Raises TypeError for anything else, ValueError for no numbers, or NaN or infinity among them.
        """
        if isinstance(given, Values):
            self.tensor: Shaped[Tensor, "*shape"] = given.tensor
            return
        if not isinstance(given, Tensor):
            try:
                given = torch.tensor(given, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{what} must be a tensor, or lists of numbers of equal lengths: {error}") from error
        if not given.is_floating_point():
            raise TypeError(f"{what} must be of a floating-point dtype, got {given.dtype}")
        if not given.numel():
            raise ValueError(f"{what} is empty: shape {list(given.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            copy = given.detach().clone().contiguous()
        if not bool(copy.isfinite().all()):
            raise ValueError(f"{what} must hold finite numbers, got NaN or infinity")
        self.tensor = copy

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @cached_property
    def sha256(self) -> str:
        return digest(self.tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return NotImplemented
        mine, theirs = self.tensor, other.tensor
        if mine is theirs:
            return True
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and bool(mine.cpu().equal(theirs.cpu()))

    def __hash__(self) -> int:
        return hash((self.shape, self.tensor.dtype))

    def __repr__(self) -> str:
        return f"[{' '.join(map(str, self.shape))}]"

    @property
    def is_small(self) -> bool:
        """Whether it stands in JSON as a list."""
        return self.tensor.dtype == torch.float32 and self.tensor.numel() <= INLINE

    def describe(self, file: str | None = None, key: str | None = None) -> Any:
        """As JSON: a list if small, else what the tensor is, and where it is kept if `file` and `key` say so."""
        if self.is_small:
            return self.tensor.tolist()
        about = {"dtype": str(self.tensor.dtype).removeprefix("torch."), "shape": list(self.shape)}
        place = {} if file is None else {"file": file, "tensor": key}
        return {**place, **about, "sha256": self.sha256}


def read_values(data: Any, folder: Path, what: str) -> Values:
    """The tensor that `Values.describe` described; files are relative to `folder`.

    Raises FileNotFoundError where there is no such file; ValueError for a reference without one, with unknown keys,
    to a damaged file, a missing tensor, or one with another digest.
    """
    if not isinstance(data, Mapping):
        return Values(data, what)
    known = {"file", "tensor", "dtype", "shape", "sha256"}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{what}: unknown keys {unknown} in a tensor's reference; known: {sorted(known)}")
    if missing := sorted({"file", "tensor", "sha256"} - set(data)):
        raise ValueError(
            f"{what}: a tensor's reference needs {missing}; `save_edits` writes tensors beside the JSON, a description "
            "alone does not hold them"
        )
    path = folder / data["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            if data["tensor"] not in file.keys():  # noqa: SIM118 (not a mapping)
                raise ValueError(f"{what}: {path} has no tensor {data['tensor']!r}; it has {sorted(file.keys())}")
            tensor = file.get_tensor(data["tensor"])
    except SafetensorError as error:
        raise ValueError(f"{what}: {path} is truncated or not a safetensors file: {error}") from error
    if (found := digest(tensor)) != data["sha256"]:
        raise ValueError(
            f"{what}: {path} holds another tensor {data['tensor']!r}: SHA-256 {found}, not {data['sha256']}"
        )
    return Values(tensor, what)
