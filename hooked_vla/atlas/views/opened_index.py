"""The feature indexes of a run, opened when first asked for, and never beyond the run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import IndexFolder, RolloutFolder, Run
from hooked_vla.atlas.worker import WorkError
from hooked_vla.extras import needs_packages
from hooked_vla.rollouts.sae.feature_index import FeatureIndex

with needs_packages(("duckdb",), "the Atlas needs: pip install 'hooked-vla[atlas]'"):
    import duckdb

_MEMORY = "1GB"
# what a manifest says of the rollouts that an index is of
_SAME = ("suite", "settings", "scenes")


def open_index(run: Run, key: str) -> FeatureIndex:
    """The index of a key. Raises NotThere for an unknown one, and one that cannot be read, saying why."""
    folder = run.indexes.get(key)
    if folder is None:
        raise NotThere(f"there is no feature index {key!r} in this run")
    if folder.error is not None:
        raise NotThere(f"{run.shown(folder.path)}: {folder.error}")
    return run.keep(f"index {key}", lambda: _opened(run, folder))


def _opened(run: Run, folder: IndexFolder) -> FeatureIndex:
    # links could lead anywhere
    links = [path.name for path in [*folder.path.iterdir(), *folder.path.glob("activations/*")] if path.is_symlink()]
    if links:
        raise NotThere(f"{run.shown(folder.path)} holds links, which are not followed: {sorted(links)[:3]}")
    try:
        found = FeatureIndex(folder.path, _MEMORY, run.cache / "spill")
        # numbers and names that everything else relies on
        about: Mapping[str, Any] = found.manifest
        if not isinstance(found.n_features, int) or found.n_features < 1 or not isinstance(about["about"], dict):
            raise ValueError("its manifest has no number of features, or not what it is of")
        _ = {**about["generality"]["weights"]}, int(about["block_rows"]), [*about["denoise_steps"]]
        return found
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        said = f"its manifest has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise NotThere(f"{run.shown(folder.path)} cannot be read: {_without(folder.path, said)}") from error


@contextmanager
def reading(run: Run, key: str) -> Iterator[FeatureIndex]:
    """The index, while queries run. Raises NotThere as `open_index`, and where a table turns out to be damaged, or has
    no such feature, plan or episode."""
    index = open_index(run, key)
    try:
        yield index
    except WorkError:
        # what a worker says is not of the index
        raise
    except (duckdb.Error, ValueError, KeyError, IndexError) as error:
        raise NotThere(f"{run.shown(index.folder)}: {_without(index.folder, str(error))}") from error


def _without(folder: Path, text: str) -> str:
    """The first line of a message; where the folder is on this machine is nobody's business."""
    lines = text.replace(f"{folder.absolute()}/", "").replace(str(folder.absolute()), folder.name).splitlines()
    return lines[0] if lines else "it is damaged"


def whole(text: str, what: str) -> int:
    """A number of an address. Raises NotThere for what is none."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise NotThere(f"{text!r} is no number of a {what}")
    return int(text)


def rollouts_of(run: Run, index: FeatureIndex) -> RolloutFolder | None:
    """The episodes that the index's activations are of, where the run holds them: those of the same weights, suite,
    settings and scenes."""
    about = index.manifest["about"]
    for folder in run.rollouts.values():
        manifest = folder.manifest
        model, suite = manifest.get("model"), manifest.get("suite")
        if not isinstance(model, dict) or not isinstance(suite, dict):
            continue
        theirs = {"suite": suite.get("name"), "settings": manifest.get("settings"), "scenes": manifest.get("scenes")}
        if model.get("weights") == about.get("weights") and all(theirs[name] == about.get(name) for name in _SAME):
            return folder
    return None
