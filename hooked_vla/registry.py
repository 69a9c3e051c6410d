"""Finding models: every file of model_specs is one, its family module is the file of that name in models."""

import importlib
import pkgutil
from collections.abc import Container, Iterable, Sequence
from functools import cache
from types import ModuleType

from hooked_vla import processors
from hooked_vla.models.network import Network
from hooked_vla.policy import Processor
from hooked_vla.spec import ModelSpec

SIZES = {"full": "SPEC", "tiny": "TINY", "tabletop": "TABLETOP"}


@cache
def _spec_modules() -> dict[str, ModuleType]:
    # by name: the package is mapped in pyproject.toml, which static checkers do not follow
    model_specs = importlib.import_module("hooked_vla.model_specs")
    names = [info.name for info in pkgutil.iter_modules(model_specs.__path__, "hooked_vla.model_specs.")]
    found = [importlib.import_module(name) for name in names]
    return {module.SPEC.name: module for module in sorted(found, key=lambda module: module.SPEC.name)}


def list_models() -> list[str]:
    """Names of all models."""
    return list(_spec_modules())


def get_spec(name: str, size: str = "full") -> ModelSpec:
    """The spec of a model at its published size, or a sibling with the same wiring: "tiny", or the "tabletop" size that
    the shipped policies have.

    Raises ValueError naming the known models, or the sizes that the model has.
    """
    if name not in _spec_modules():
        raise ValueError(f"unknown model {name!r}; known models: {list_models()}")
    module = _spec_modules()[name]
    sizes = [each for each, literal in SIZES.items() if hasattr(module, literal)]
    if size not in sizes:
        raise ValueError(f"unknown size {size!r} of {name!r}; sizes: {sizes}")
    return getattr(module, SIZES[size])


def spec_for_config_type(config_type: object, parts: Container[str] = (), keys: Iterable[str] = ()) -> ModelSpec:
    """The spec whose public config.json says `"type": config_type`; of several, one whose parts are there.

    keys: of the weights; they tell specs apart that share a second spelling of their type.

    Raises ValueError with the known types for any other.
    """
    specs = [get_spec(name) for name in list_models()]
    found = [spec for spec in specs if spec.config_type.split("|")[0] == config_type]
    shared = [spec for spec in specs if config_type in spec.config_type.split("|")[1:]]
    found += [spec for spec in shared if _explains(spec, list(keys))]
    for spec in sorted(found, key=lambda spec: not spec.parts):
        if not spec.parts or any(part in parts for part in spec.parts):
            return spec
    known = sorted({spec.config_type for spec in specs})
    raise ValueError(f"config.json says type {config_type!r}; known families of checkpoints: {known}")


def _explains(spec: ModelSpec, keys: Sequence[str]) -> bool:
    """Whether every prefix of the spec's key table occurs."""
    spellings = [tuple(prefix.split("|")) for prefix in spec.keys]
    return all(any(key.startswith(each) for key in keys) for each in spellings)


def family(spec: ModelSpec) -> ModuleType:
    """The module in models/ that wires this spec; it has NETWORK, read_spec and write_config."""
    return importlib.import_module(f"hooked_vla.models.{spec.family}")


def build_network(spec: ModelSpec) -> Network:
    """The network of a spec, initialised by PyTorch's defaults."""
    return family(spec).NETWORK(spec)


def processor_class(spec: ModelSpec) -> type[Processor]:
    """The family's own processor, where processors/<family>.py has one, else LeRobot's kind."""
    if any(info.name == spec.family for info in pkgutil.iter_modules(processors.__path__)):
        return importlib.import_module(f"hooked_vla.processors.{spec.family}").PROCESSOR
    return Processor
