"""What a worker does for a map of features: UMAP of their decoder rows (McInnes, Healy & Melville 2018)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from hooked_vla.atlas.worker import Cancelled, Emit
from hooked_vla.extras import needs_analysis_extra, needs_packages

with needs_analysis_extra():
    import pyarrow.parquet as pq

# of cosine distance; umap-learn's own defaults otherwise
N_NEIGHBOURS, MIN_DIST = 15, 0.1
# with fewer features there is nothing that principal components do not show
MIN_FEATURES = 200


def umap(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """Write an index's map. arguments: table: directions.parquet; out: the .npy file that appears when complete,
    [feature 2] float32. The same table gives the same map with the same packages."""
    columns = pq.ParquetFile(arguments["table"]).read(["feature", "components"])
    rows = np.stack(columns["components"].to_numpy()).astype(np.float32)[columns["feature"].to_numpy().argsort()]
    out = Path(arguments["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp.npy")
    np.save(temporary, umap_of(rows))
    temporary.replace(out)
    return {"features": len(rows)}


def umap_of(rows: Float32[np.ndarray, "feature component"]) -> Float32[np.ndarray, "feature 2"]:
    """The map of some rows, by the cosine between them. Raises ModuleNotFoundError without umap-learn."""
    with needs_packages(("umap",), "this map needs: pip install umap-learn"):
        import umap  # pyright: ignore[reportMissingImports]
    # a row of zeros has no direction: it lies apart, at random but the same every time
    rows = np.where(np.abs(rows).sum(1, keepdims=True) > 0, rows, np.random.default_rng(0).normal(size=rows.shape))
    # one thread, as a fixed seed asks for anyway
    made = umap.UMAP(n_neighbors=N_NEIGHBOURS, min_dist=MIN_DIST, metric="cosine", random_state=0, n_jobs=1)
    return np.asarray(made.fit_transform(rows), np.float32)
