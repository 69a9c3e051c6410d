"""Edits as JSON, with large tensors in safetensors files beside it, each known by its digest."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from math import inf, isinf
from pathlib import Path
from typing import Any

from hooked_vla.folders import write_file
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.interventions.edits import (
    NUMBER,
    SAE,
    SCALAR_OR_VALUES,
    TABLE,
    VALUES,
    WINDOWS,
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Overwrite,
    Patch,
    ProjectOut,
    Scale,
    SubspacePatch,
)
from hooked_vla.interventions.sae_edits import SAEFeatureEdit, SAEReconstruct
from hooked_vla.interventions.values import Values, read_values
from hooked_vla.interventions.where import Window, check_mapping, windows_from_json
from hooked_vla.sae.splice import SpliceSAE

FORMAT, VERSION = "hooked-vla edits", 1
EDITS: dict[str, type[Edit]] = {
    each.__name__: each
    for each in (
        Patch, Add, AddRelative, Scale, Clamp, Ablate, ProjectOut, SubspacePatch, Overwrite, SAEReconstruct,
        SAEFeatureEdit,
    )
}  # fmt: skip
_INFINITE = {"inf": inf, "-inf": -inf}


class _Beside:
    """Tensors and autoencoders that JSON refers to, and the files that hold them."""

    def __init__(self, path: Path) -> None:
        self.folder, self.stem = path.parent, path.stem
        self.tensors: dict[str, Values] = {}
        self.saes: dict[str, SpliceSAE] = {}

    def values(self, given: Values) -> Any:
        if not given.is_small:
            self.tensors[given.sha256] = given
        return given.describe(f"{self.stem}.safetensors", given.sha256[:16])

    def sae(self, given: SpliceSAE) -> Any:
        if given.file is not None and given.file.is_file():
            # edits and autoencoders may move together
            file = os.path.relpath(given.file.resolve(), self.folder.resolve())
        else:
            file = f"{self.stem}.sae-{given.sha256[:16]}.safetensors"
            self.saes[file] = given
        return {"file": file, "sha256": given.sha256}

    def write(self) -> None:
        for file, sae in self.saes.items():
            sae.save(self.folder / file)
        if self.tensors:
            entries = [
                (sha256[:16], each.tensor.dtype, each.shape, lambda each=each: each.tensor)
                for sha256, each in sorted(self.tensors.items())
            ]
            write_safetensors(self.folder / f"{self.stem}.safetensors", entries, {"format": f"{FORMAT} {VERSION}"})


def describe_edits(edits: Sequence[Edit]) -> dict[str, Any]:
    """The edits as JSON-serialisable data; a large tensor, or an autoencoder, stands there by its digest alone."""
    return _document([_to_json(edit, None) for edit in edits])


def save_edits(edits: Sequence[Edit], path: str | Path) -> None:
    """Write the edits to a JSON file, and their large tensors to one beside it with the suffix .safetensors.

    An autoencoder that was loaded from a file, or saved to one, is referred to by its path relative to the JSON; others
    are written beside it. The JSON comes last, and each file appears when complete.
    """
    path = Path(path)
    beside = _Beside(path)
    document = _document([_to_json(edit, beside) for edit in edits])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write()
    write_file(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def load_edits(path: str | Path) -> list[Edit]:
    """The edits of a JSON file that `save_edits` wrote, or that was written by hand.

    Raises FileNotFoundError; ValueError for JSON that is damaged, of another format or version, or that has unknown or
    missing keys, each named; and for tensors that are not those the JSON means.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return read_edits(data, path.parent, str(path))


def read_edits(data: Any, folder: Path = Path(), what: str = "edits") -> list[Edit]:
    """The edits that JSON data stands for; files are relative to `folder`. what: what messages call the data.

    Raises as `load_edits`.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"{what}: format {found!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"{what}: version {data.get('version')!r}; this version of the library reads {VERSION}")
    keys = ("format", "version", "edits")
    check_mapping(data, keys, keys, what)
    if not isinstance(data["edits"], list):
        raise ValueError(f"{what}: edits must be a list, got {type(data['edits']).__name__}")
    return [_from_json(each, folder, f"{what}: edit {i}") for i, each in enumerate(data["edits"])]


def _document(edits: list[dict[str, Any]]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "edits": edits}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _to_json(edit: Edit, beside: _Beside | None) -> dict[str, Any]:
    found: dict[str, Any] = {"edit": edit.kind}
    for each in fields(edit):
        value = getattr(edit, each.name)
        if each.default is not MISSING and value == each.default:
            continue
        if isinstance(value, Values):
            value = value.describe() if beside is None else beside.values(value)
        elif isinstance(value, SpliceSAE):
            value = {"sha256": value.sha256} if beside is None else beside.sae(value)
        elif each.metadata.get("as") == WINDOWS:
            value = [[window.start, window.stop] for window in value if isinstance(window, Window)]
        else:
            value = _plain(value)
        found[each.name] = value
    return found


def _from_json(data: Any, folder: Path, what: str) -> Edit:
    if not isinstance(data, Mapping) or data.get("edit") not in EDITS:
        found = data.get("edit") if isinstance(data, Mapping) else data
        raise ValueError(f"{what}: unknown edit {found!r}; edits: {', '.join(EDITS)}")
    kind = EDITS[data["edit"]]
    what = f"{what} ({kind.__name__})"
    known = {each.name: each for each in fields(kind)}
    required = [name for name, each in known.items() if each.default is MISSING]
    check_mapping(data, ["edit", *known], ["edit", *required], what)
    arguments = {}
    for name, value in data.items():
        if name != "edit":
            arguments[name] = _read(known[name].metadata.get("as"), value, folder, f"{what}, {name}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def _read(kind: str | None, value: Any, folder: Path, what: str) -> Any:
    if value is None:
        return None
    if kind == VALUES:
        return read_values(value, folder, what)
    if kind == SCALAR_OR_VALUES and not isinstance(value, str | int | float):
        return read_values(value, folder, what)
    if kind == WINDOWS:
        return windows_from_json(value)
    if kind == SAE:
        data = check_mapping(value, ("file", "sha256"), ("file", "sha256"), what)
        sae = SpliceSAE.load(folder / data["file"])
        if sae.sha256 != data["sha256"]:
            raise ValueError(f"{what}: {sae.file} is another autoencoder: SHA-256 {sae.sha256}, not {data['sha256']}")
        return sae
    return _number(value) if kind in (NUMBER, TABLE, SCALAR_OR_VALUES) else value


def _number(value: Any) -> Any:
    """Numbers, or the texts that stand for infinite ones; whatever else passes, for the edit to judge."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    return _INFINITE.get(value, value) if isinstance(value, str) else value
