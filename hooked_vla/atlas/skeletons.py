"""Models without weights: the structure that a run's manifest describes, rebuilt to be drawn."""

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any

import torch

from hooked_vla import registry
from hooked_vla.spec import ModelSpec
from hooked_vla.vla import HookedVLA
from hooked_vla.weights import open_checkpoint

# what a manifest may ask to be built: it is read from a file
MAX_NUMBER, MAX_LAYERS = 10**7, 512
# of these the library's own stand: they name files and keys or state totals, and make no structure
_OWN = {"name", "family", "config_type", "checkpoints", "keys", "tied", "parts", "fp32", "n_parameters"}


def skeleton(spec: ModelSpec) -> HookedVLA:
    """A model of the spec without memory for its weights."""
    with torch.device("meta"):
        return HookedVLA.from_network(spec, registry.build_network(spec))


@cache
def shipped_spec(name: str) -> ModelSpec:
    """The spec of a policy that comes with the package, read from its small files."""
    checkpoint = open_checkpoint(name)
    announced = checkpoint.config.get("type", checkpoint.config.get("model_type"))
    base = registry.spec_for_config_type(announced, checkpoint.parts, checkpoint.tensors)
    return registry.family(base).read_spec(base, checkpoint)


def spec_from_json(found: Mapping[str, Any]) -> ModelSpec:
    """A spec as manifests have it: the library's spec of that name, with the sizes and choices that stand there.

    Raises ValueError for an unknown name, entries that the spec does not have, and sizes that nothing real has.
    """
    name = found.get("name")
    if not isinstance(name, str):
        raise ValueError(f"a spec has a name, got {name!r}")
    base = registry.get_spec(name)
    values = {key: value for key, value in found.items() if key not in _OWN}
    return _like(base, values, name)


def _like(base: Any, found: Mapping[str, Any], where: str) -> Any:
    """A dataclass with other values, of the same types."""
    known = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"{where} has no entries {unknown}; it has {sorted(known)}")
    hints = typing.get_type_hints(type(base))
    changes = {key: _value(hints[key], known[key], value, f"{where}.{key}") for key, value in found.items()}
    return dataclasses.replace(base, **changes)


def _value(hint: Any, base: Any, found: Any, where: str) -> Any:
    if isinstance(found, Mapping):
        kinds = [kind for kind in _alternatives(hint) if dataclasses.is_dataclass(kind)]
        if dataclasses.is_dataclass(base) and not isinstance(base, type):
            return _like(base, found, where)
        if kinds:
            return _made(kinds[0], found, where)
        return {str(key): _value(Any, None, value, where) for key, value in found.items()}
    if isinstance(found, list):
        if len(found) > MAX_LAYERS:
            raise ValueError(f"{where} has {len(found)} entries, at most {MAX_LAYERS} can be drawn")
        olds = base if isinstance(base, tuple) and len(base) == len(found) else (None,) * len(found)
        inner = next(iter(typing.get_args(hint)), Any)
        return tuple(_value(inner, old, value, where) for old, value in zip(olds, found, strict=True))
    counts = where.rpartition(".")[2] in ("n_layers", "n_blocks", "depth", "depths")
    if isinstance(found, int) and not 0 <= abs(found) <= (MAX_LAYERS if counts else MAX_NUMBER):
        raise ValueError(f"{where} is {found}: too large to be drawn")
    if found is not None and not isinstance(found, str | int | float):
        raise ValueError(f"{where} cannot be {found!r}")
    return found


def _made(kind: Any, found: Mapping[str, Any], where: str) -> Any:
    """A part that the library's own spec leaves out."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(found) - set(hints)):
        raise ValueError(f"{where} has no entries {unknown}; it has {sorted(hints)}")
    try:
        return kind(**{key: _value(hints[key], None, value, f"{where}.{key}") for key, value in found.items()})
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {error}") from error


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
