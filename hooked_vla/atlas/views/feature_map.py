"""Where features lie on a map: principal components, which every index has, and UMAP, which is made once and kept."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vla.atlas.projections import MIN_DIST, MIN_FEATURES, N_NEIGHBOURS
from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.opened_index import reading
from hooked_vla.atlas.worker import Worker, WorkError
from hooked_vla.folders import stamp
from hooked_vla.rollouts.sae.feature_index import FeatureIndex

PCA, UMAP = "pca", "umap"
# seconds: thousands of features take a minute or two
_UMAP_S = 1800.0


def projections_of(run: Run, index: FeatureIndex) -> dict[str, str]:
    """Every map and its state: "ready", "to be made", "umap-learn is not installed", or "too few features"."""
    if _file(run, index).is_file():
        state = "ready"
    elif index.n_features < MIN_FEATURES:
        state = "too few features"
    else:
        state = "to be made" if find_spec("umap") is not None else "umap-learn is not installed"
    return {PCA: "ready", UMAP: state}


def get_map(run: Run, index: str, projection: str) -> dict[str, Any]:
    """x and y of every feature, feature 0 first; UMAP is made now if need be, which takes its time.

    Raises NotThere for another map, and where UMAP cannot be made.
    """
    with reading(run, index) as found:
        if projection == PCA:
            table = found.sql("SELECT x, y FROM directions ORDER BY feature")
            return _answer(table.to_numpy(np.float64))
        if projection != UMAP:
            raise NotThere(f"there is no map {projection!r}: {PCA}, {UMAP}")
        state, out = projections_of(run, found)[UMAP], _file(run, found)
        if state not in ("ready", "to be made"):
            raise NotThere(f"no UMAP: {state}")
        if state != "ready":
            asked = {"table": str(found.folder.absolute() / "directions.parquet"), "out": str(out)}
            worker = run.keep("projections", lambda: Worker("projection"))
            try:
                # two that ask: the second finds it made
                if not out.is_file():
                    worker.run(UMAP, asked, _UMAP_S)
            except WorkError as error:
                raise NotThere(f"no UMAP: {error}") from error
        return _answer(np.load(out, allow_pickle=False))


def _answer(places: np.ndarray) -> dict[str, Any]:
    rounded = [[float(f"{value:.5g}") for value in column] for column in places.T.tolist()]
    return {"x": rounded[0], "y": rounded[1]}


def _file(run: Run, index: FeatureIndex) -> Path:
    """Of the map, in the run's cache: another for another table, and other settings."""
    named = repr((str(index.folder), *stamp(index.folder / "directions.parquet"), N_NEIGHBOURS, MIN_DIST))
    return run.cache / "maps" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.npy"
