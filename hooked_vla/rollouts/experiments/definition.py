"""What an experiment is, as data: a TOML file, read strictly.

id = "E2"                    # name of the experiment, and of its folder
title, question, published   # for the report; published: what others claim, with the source
kind = "injection"           # module of `kinds` that runs it
models = ["smolvla-tabletop", ...]  # on which it makes sense; the first where none is asked for
[settings]                   # of the kind, see its `Settings`
[quick]                      # settings that a quick run has instead
[[rules]]                    # what must be seen for the claim to hold: id, text, and the number that decides
"""

import dataclasses
import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from beartype.door import is_bearable

_HERE = "hooked_vla.rollouts.experiments"
_KINDS = f"{_HERE}.kinds"
_TEXTS = ("id", "title", "question", "published", "kind")


@dataclass(frozen=True)
class Rule:
    """What must be seen for a claim to hold. threshold: the number that decides, None where the text has none."""

    id: str
    text: str
    threshold: float | None = None


@dataclass(frozen=True)
class Definition:
    """An experiment. settings, quick: plain values, checked against the kind's `Settings`."""

    id: str
    title: str
    question: str
    published: str
    kind: str
    models: tuple[str, ...]
    settings: Mapping[str, Any]
    quick: Mapping[str, Any]
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for quick in (False, True):
            self.settle(quick)

    @property
    def module(self) -> ModuleType:
        """The module that runs it, which has `Settings` and `run(context, settings)`."""
        return importlib.import_module(f"{_KINDS}.{self.kind}")

    def settle(self, quick: bool) -> Any:
        """The kind's `Settings` of a full or a quick run.

        Raises ValueError naming unknown or missing settings and those of a wrong type.
        """
        values = {**self.settings, **(self.quick if quick else {})}
        kind = self.module.Settings
        known = {field.name: field for field in dataclasses.fields(kind)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{self.id}: settings {unknown} are unknown to {self.kind!r}; it has {sorted(known)}")
        needed = {name for name, field in known.items() if _has_no_default(field)}
        if missing := sorted(needed - set(values)):
            raise ValueError(f"{self.id}: settings {missing} are missing")
        hints = get_type_hints(kind)
        values = {name: _tupled(value) for name, value in values.items()}
        for name, value in values.items():
            if not is_bearable(value, hints[name]):
                raise ValueError(f"{self.id}: the setting {name!r} must be {_said(hints[name])}, got {value!r}")
        return kind(**values)


def list_experiments() -> dict[str, Definition]:
    """The experiments of the library by id, in the order of their numbers."""
    found = [find_experiment(file.name.removesuffix(".toml")) for file in _shipped() if file.name.endswith(".toml")]
    return {each.id: each for each in sorted(found, key=lambda each: (len(each.id), each.id))}


def find_experiment(name: str | Path) -> Definition:
    """An experiment of the library by its id, or one in a file.

    Raises FileNotFoundError with the known ids; ValueError as `read_definition`.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return read_definition(path.read_text(), str(path))
    known = {file.name.removesuffix(".toml"): file for file in _shipped() if file.name.endswith(".toml")}
    if str(name) not in known:
        ids = sorted(known, key=lambda each: (len(each), each))
        raise FileNotFoundError(f"no experiment {str(name)!r}; there are {', '.join(ids)}, or give a .toml file")
    return _read_shipped(str(name))


@cache
def _read_shipped(name: str) -> Definition:
    return read_definition(files(_HERE).joinpath("files", f"{name}.toml").read_text(), name)


def _shipped() -> list[Any]:
    return list(files(_HERE).joinpath("files").iterdir())


def read_definition(text: str, where: str) -> Definition:
    """A definition from TOML; where: what messages call it.

    Raises ValueError for what is no TOML, for unknown or missing entries, entries of a wrong type, an unknown kind,
    and settings that the kind does not take.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from error
    names = [field.name for field in dataclasses.fields(Definition)]
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{where}: unknown entries {unknown}; known: {names}")
    found = {"settings": {}, "quick": {}, "rules": []} | found
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{where}: entries {missing} are missing")
    for name in _TEXTS:
        if not isinstance(found[name], str) or not found[name].strip():
            raise ValueError(f"{where}: {name} must be a text that is not empty, got {found[name]!r}")
    if not is_bearable(found["models"], list[str]) or not found["models"]:
        raise ValueError(f"{where}: models must be a list of names, got {found['models']!r}")
    for name in ("settings", "quick"):
        if not isinstance(found[name], dict):
            raise ValueError(f"{where}: {name} must be a table, got {found[name]!r}")
    try:
        importlib.import_module(f"{_KINDS}.{found['kind']}")
    except ModuleNotFoundError as error:
        if error.name != f"{_KINDS}.{found['kind']}":
            raise
        kinds = sorted(file.name.removesuffix(".py") for file in files(_KINDS).iterdir() if "_" not in file.name)
        raise ValueError(f"{where}: unknown kind {found['kind']!r}; kinds: {kinds}") from error
    rules = _rules(found["rules"], where)
    return Definition(**found | {"models": tuple(found["models"]), "rules": rules})


def _rules(found: Any, where: str) -> tuple[Rule, ...]:
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{where}: rules must be tables ([[rules]])")
    for each in found:
        if not {"id", "text"} <= set(each) <= {"id", "text", "threshold"}:
            raise ValueError(f"{where}: a rule has id, text and perhaps threshold, got {each}")
        if not isinstance(each["id"], str) or not isinstance(each["text"], str):
            raise ValueError(f"{where}: a rule's id and text must be texts, got {each}")
        if isinstance(each.get("threshold"), bool) or not isinstance(each.get("threshold"), int | float | None):
            raise ValueError(
                f"{where}: the threshold of rule {each['id']!r} must be a number, got {each['threshold']!r}"
            )
    rules = tuple(Rule(each["id"], " ".join(each["text"].split()), each.get("threshold")) for each in found)
    ids = [rule.id for rule in rules]
    if twice := sorted({each for each in ids if ids.count(each) > 1}):
        raise ValueError(f"{where}: rules need different ids; used more than once: {twice}")
    return rules


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _tupled(value: Any) -> Any:
    """TOML's lists as tuples, which frozen settings can hold."""
    return tuple(_tupled(each) for each in value) if isinstance(value, list) else value


def _said(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
