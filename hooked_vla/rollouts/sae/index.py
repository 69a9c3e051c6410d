"""An index of an autoencoder's features over a store of activations: Parquet files, which DuckDB reads in place.

FOLDER/manifest.json           of which autoencoder and store; complete when all of the following is there
FOLDER/activations/000000.parquet   every feature above 0 of 65,536 rows of the store, by feature: feature, the row's
                               ids (see sae/rows.py), value
FOLDER/frames.parquet          every plan of every episode: episode, env_step, n_rows of the store, all of them from
                               first_row to last_row, and labels
FOLDER/layout.parquet          the tokens of each episode: episode, segment, camera, position
FOLDER/peaks.parquet           feature, episode, env_step: maximum and total over the plan's rows, n_active of them
FOLDER/shares.parquet          feature, kind and value of a label: share of the activation, and its lift
FOLDER/concepts.parquet        features that tell labels, see sae/concepts.py
FOLDER/neighbours.parquet      feature, kind (decoder or coactive), place, neighbour, value
FOLDER/histograms.parquet      feature, bin (of N_BINS equal ones from 0 to the feature's maximum), count of rows
FOLDER/directions.parquet      feature, x and y (principal components of decoder rows of length 1), components (the
                               first N_COMPONENTS of them), sha256 of the decoder row, as edits describe it
FOLDER/features.parquet        feature: density (of rows), frames (share of plans), maximum, mean, the figures of
                               sae/generality.py, description

>>> index = build_index(TokenStore("activations"), sae, "index")      # or FeatureIndex("index"), see feature_index.py
>>> index.top_frames(12), index.heat_map(12, episode=3, env_step=20), index.search("grasp red")

Memory: of activations, one block (65,536 × (4·d + 60·k) bytes, k the active features of a row); what DuckDB sorts and
groups goes to disk beyond `memory`; peaks are all in memory for generality and concepts, 60 bytes each.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hooked_vla.extras import needs_analysis_extra, needs_packages
from hooked_vla.folders import lock, read_manifest, write_json
from hooked_vla.interventions.values import digest
from hooked_vla.rollouts.labelled import folder_labels
from hooked_vla.rollouts.sae.collect import ROLLOUTS
from hooked_vla.rollouts.sae.duck import connect, view
from hooked_vla.rollouts.sae.feature_index import COMPLETE, FORMAT, MANIFEST, N_BINS, FeatureIndex
from hooked_vla.rollouts.sae.loop_arms import weights_hash
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.concepts import Concept, directions, find_concepts
from hooked_vla.sae.descriptions import Share, describe
from hooked_vla.sae.feature_steps import FeatureSteps
from hooked_vla.sae.generality import ON, PUBLISHED, Generality, generality
from hooked_vla.sae.neighbours import coactive_neighbours, decoder_neighbours, principal_components
from hooked_vla.sae.rows import IDS, NONE
from hooked_vla.sae.store import TokenStore

with needs_packages(("duckdb",), "the index of features needs: pip install 'hooked-vla[sae]'"):
    import duckdb
with needs_analysis_extra():
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

BLOCK_ROWS = 65_536
# of the rows, spread evenly, from which co-activation is counted
COACTIVE_ROWS = 65_536
N_NEIGHBOURS = 10
# of decoder rows, what a map of features is drawn from
N_COMPONENTS = 50
# rows of a table's parts: the features that a part has are known without reading it
_PART_ROWS = 65_536
# labels that concepts are looked for in; those of a token's place are only described
LABELS = ("phase", "direction", "block", "pad", "outcome")
# widths of actions whose first three numbers move the end effector
_MOVES = (4, 7)
# less than this share of a large movement (the 95th percentile) is none
_STILL = 0.1


def build_index(
    store: TokenStore,
    sae: SparseAutoencoder,
    out: str | Path,
    model: Generality = PUBLISHED["libero"],
    on: float = ON,
    labels: pd.DataFrame | None = None,
    memory: str = "2GB",
    progress: bool = False,
) -> FeatureIndex:
    """Index an autoencoder's features over a store; a call that was interrupted goes on, a complete one only opens.

    model, on: of the metric of generality, see sae/generality.py. labels: of every plan, with episode, env_step, task,
    seed and any of LABELS; None for what `collect` recorded beside the store. memory: of DuckDB, as in "2GB".
    Raises KeyError for a site that the store does not have; ValueError for an autoencoder of other rows (width,
    pooling), an empty or unfinished store, one with a shard that was changed, labels that lack plans, and a folder with
    another index; BlockingIOError where another process writes there.
    """
    out = Path(out)
    about = _about(store, sae, model, on)
    with _claimed(out, about) as done:
        if not done:
            store.verify(progress)
            _encode(store, sae, out, progress)
            frames = _frames(store, sae, labels)
            _write(out / "frames.parquet", pa.Table.from_pandas(frames, preserve_index=False))
            _layout(store, sae.config.site, out)
            with connect(out, memory) as duck:
                _tables(duck, store, sae, out, frames, model, on)
            write_json(out / MANIFEST, {**about, COMPLETE: True})
    return FeatureIndex(out)


def _about(store: TokenStore, sae: SparseAutoencoder, model: Generality, on: float) -> dict[str, Any]:
    """What the index is of, as its manifest says it."""
    config = sae.config
    store.group(config.site)
    sae.check_fits(config.site, store.widths[config.site])
    pooling = store.about.get("pooling", config.pooling)
    if pooling != config.pooling:
        raise ValueError(
            f"{config.label} is of rows pooled by {config.pooling!r}, {store.folder} has them by {pooling!r}"
        )
    if not store.complete or not store.n_rows(config.site):
        raise ValueError(f"{store.folder} is not complete: run what collects it again")
    if config.n_features < 2:
        raise ValueError(f"{config.label} has a single feature: there is nothing to index")
    return {
        "format": FORMAT, "site": config.site, "model": config.model, "sae": weights_hash(sae),
        "n_features": config.n_features, "pooling": pooling, "rows": store.n_rows(config.site),
        "about": dict(store.about), "names": store.names.to_json(),
        "denoise_steps": store.ids(config.site)[:, IDS.index("denoise_step")].unique().tolist(),
        "generality": {**model.to_json(), "on": on}, "block_rows": BLOCK_ROWS,
    }  # fmt: skip


@contextmanager
def _claimed(out: Path, about: Mapping[str, Any]) -> Iterator[bool]:
    """The folder, for this process alone; whether everything is there already."""
    path = out / MANIFEST
    if path.is_file():
        known = read_manifest(path, FORMAT, "an index of features")
        differ = [name for name, value in json.loads(json.dumps(about)).items() if known.get(name) != value]
        if differ:
            raise ValueError(f"{out} holds another index: {', '.join(differ)} differ; choose another folder")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} has no {MANIFEST}, but holds {sorted(each.name for each in out.iterdir())[:5]}")
    else:
        write_json(path, {**about, COMPLETE: False})
    opened = os.open(out, os.O_RDONLY)
    try:
        lock(opened, f"writing the index {out}")
        for left in [*out.glob(".*.tmp"), *out.glob("*/.*.tmp")]:
            left.unlink(missing_ok=True)
        yield bool(read_manifest(path, FORMAT, "an index of features")[COMPLETE])
    finally:
        os.close(opened)


def _write(path: Path, table: pa.Table) -> None:
    """A Parquet file, which appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", row_group_size=_PART_ROWS)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(store: TokenStore, sae: SparseAutoencoder, out: Path, progress: bool) -> None:
    """The activations, block by block; blocks that are there stay."""
    site, device = sae.config.site, sae.w_enc.device
    n = store.n_rows(site)
    ids = store.ids(site)
    for start in tqdm(range(0, n, BLOCK_ROWS), desc="encoding", unit="block", disable=not progress):
        path = out / "activations" / f"{start // BLOCK_ROWS:06d}.parquet"
        if path.is_file():
            continue
        size = min(BLOCK_ROWS, n - start)
        rows = torch.empty(size, store.widths[site], dtype=store.dtype(site))
        store.copy(site, start, rows)
        code = sae.encode_sparse(rows.to(device, sae.w_enc.dtype))
        values, indices = code.values.cpu(), code.indices.cpu()
        row, place = (values > 0).nonzero(as_tuple=True)
        feature = indices[row, place]
        order = feature.argsort(stable=True)
        row = row[order]
        columns = {"feature": feature[order].int().numpy(), "row": (row + start).numpy()}
        columns |= {name: ids[start + row, i].numpy() for i, name in enumerate(IDS)}
        columns["value"] = values[row, place[order]].float().numpy()
        _write(path, pa.table(columns))


def _frames(store: TokenStore, sae: SparseAutoencoder, labels: pd.DataFrame | None) -> pd.DataFrame:
    """One row a plan, in order, with its labels."""
    ids = store.ids(sae.config.site)[:, :2].numpy()
    places, first, counts = np.unique(ids, axis=0, return_index=True, return_counts=True)
    # of the rows in reverse, the first of a plan is its last
    last = len(ids) - 1 - np.unique(ids[::-1], axis=0, return_index=True)[1]
    frames = pd.DataFrame({
        "episode": places[:, 0], "env_step": places[:, 1], "n_rows": counts, "first_row": first, "last_row": last,
    })  # fmt: skip
    known = simulator_labels(store) if labels is None else labels
    if lacking := sorted({"episode", "env_step", "task", "seed"} - set(known.columns)):
        raise ValueError(f"the labels lack columns {lacking}")
    there = [name for name in LABELS if name in known and bool(known[name].notna().any())]
    kept = ["episode", "env_step", "task", "seed", *there]
    joined = frames.merge(known[kept], on=["episode", "env_step"], how="left", validate="one_to_one")
    unlabelled = np.asarray(joined["task"].isna(), bool)
    if missing := places[unlabelled].tolist():
        raise ValueError(f"no labels for plans (episode, environment step) {missing[:3]}")
    return joined


def simulator_labels(store: TokenStore) -> pd.DataFrame:
    """`step_labels` of the episodes that a store is of, with outcome (success, failure) and, where actions move an end
    effector, direction: "+x", ..., "still", of the next action.

    Raises FileNotFoundError for a store without its rollouts.
    """
    table = folder_labels(store.folder / ROLLOUTS)
    table["outcome"] = np.where(table["success"], "success", "failure")
    actions = [name for name in table.columns if name.startswith("action_")]
    if len(actions) in _MOVES:
        motion = table[["action_0", "action_1", "action_2"]].to_numpy(np.float64)
        still = _STILL * float(np.quantile(np.abs(motion).max(1), 0.95))
        table["direction"] = directions(motion, still)
    return table


def _layout(store: TokenStore, site: str, out: Path) -> None:
    """Which tokens every episode has: those of its first plan."""
    ids = store.ids(site).numpy()
    first = ids[:, 1] == 0
    columns = [IDS.index(name) for name in ("episode", "segment", "camera", "position")]
    found = np.unique(ids[first][:, columns], axis=0)
    names = ("episode", "segment", "camera", "position")
    _write(out / "layout.parquet", pa.table({name: found[:, i] for i, name in enumerate(names)}))


def _tables(
    duck: "duckdb.DuckDBPyConnection", store: TokenStore, sae: SparseAutoencoder, out: Path, frames: pd.DataFrame,
    model: Generality, on: float,
) -> None:  # fmt: skip
    """Everything that is made from activations and frames."""
    m, n_rows = sae.config.n_features, store.n_rows(sae.config.site)
    peaks = duck.sql(
        "SELECT feature, episode, env_step, max(value) AS maximum, sum(value) AS total, "
        "count(*)::INTEGER AS n_active FROM activations GROUP BY ALL ORDER BY feature, maximum DESC"
    )
    _write(out / "peaks.parquet", peaks.to_arrow_table())
    view(duck, out, "peaks")
    steps = _steps(pq.read_table(out / "peaks.parquet"), frames, m)
    concepts = _concepts(steps, frames)
    _write(out / "concepts.parquet", _concept_table(concepts))
    shares = _shares(duck, store, sae.config.site, frames)
    _write(out / "shares.parquet", pa.Table.from_pandas(shares, preserve_index=False))
    _write(out / "neighbours.parquet", _neighbour_table(duck, sae, n_rows))
    _write(out / "directions.parquet", _direction_table(sae))
    features = _feature_table(duck, steps, shares, concepts, n_rows, model, on)
    duck.register("figures", features)
    # a value at the maximum belongs to the last bin
    counted = duck.sql(
        f"SELECT feature, least(floor(value / maximum * {N_BINS}), {N_BINS - 1})::INTEGER AS bin, count(*) AS count "
        "FROM activations JOIN figures USING (feature) GROUP BY ALL ORDER BY ALL"
    )
    _write(out / "histograms.parquet", counted.to_arrow_table())
    duck.unregister("figures")
    _write(out / "features.parquet", features)


def _steps(peaks: pa.Table, frames: pd.DataFrame, m: int) -> FeatureSteps:
    """Each feature's largest activation of every plan."""
    place = {pair: i for i, pair in enumerate(zip(frames["episode"], frames["env_step"], strict=True))}
    episode, env_step = (peaks[name].to_numpy() for name in ("episode", "env_step"))
    pairs, inverse = np.unique(np.stack([episode, env_step], 1), axis=0, return_inverse=True)
    rows = np.array([place[tuple(pair)] for pair in pairs.tolist()], np.int64)[inverse.reshape(-1)]
    values = peaks["maximum"].to_numpy()
    return FeatureSteps.of(rows, peaks["feature"].to_numpy(), values, np.asarray(frames["episode"], np.int64), m)


def _concepts(steps: FeatureSteps, frames: pd.DataFrame) -> list[Concept]:
    """None where there is a single seed, of which nothing can be held out."""
    labels = {name: [None if pd.isna(v) else str(v) for v in frames[name]] for name in LABELS if name in frames}
    seeds = np.asarray(frames["seed"], np.int64)
    if not labels or len(set(seeds.tolist())) < 2:
        return []
    return find_concepts(steps, labels, [str(each) for each in frames["task"]], seeds)


def _concept_table(concepts: list[Concept]) -> pa.Table:
    rows = [
        {
            "kind": each.kind, "value": each.value, "place": place, "feature": found.feature,
            "d": found.chosen.d, "score": found.chosen.score, "held_out_d": found.held_out.d,
            "held_out_score": found.held_out.score, "held_out_within": found.held_out.within,
            "p_value": found.p_value, "is_confirmed": found.is_confirmed, "is_confounded": each.is_confounded,
        }
        for each in concepts for place, found in enumerate(each.features)
    ]  # fmt: skip
    numbers = [(name, pa.float64()) for name in ("d", "score", "held_out_d", "held_out_score", "held_out_within",
                                                 "p_value")]  # fmt: skip
    return pa.Table.from_pylist(rows, pa.schema([
        ("kind", pa.string()), ("value", pa.string()), ("place", pa.int32()), ("feature", pa.int32()), *numbers,
        ("is_confirmed", pa.bool_()), ("is_confounded", pa.bool_()),
    ]))  # fmt: skip


def _shares(duck: "duckdb.DuckDBPyConnection", store: TokenStore, site: str, frames: pd.DataFrame) -> pd.DataFrame:
    """Of every feature, how its activation is spread over the labels of plans and over segments and denoise steps."""
    parts = []
    for kind in ("task", *(name for name in LABELS if name in frames)):
        parts.append(duck.sql(
            f"WITH base AS (SELECT {kind}::VARCHAR AS value, sum(n_rows) / sum(sum(n_rows)) OVER () AS of_all "
            f"FROM frames WHERE {kind} IS NOT NULL GROUP BY 1), own AS (SELECT feature, {kind}::VARCHAR AS value, "
            f"sum(total) AS total FROM peaks JOIN frames USING (episode, env_step) WHERE {kind} IS NOT NULL GROUP BY "
            f"ALL) SELECT feature, '{kind}' AS kind, value, total / sum(total) OVER (PARTITION BY feature) AS share, "
            "share / of_all AS lift FROM own JOIN base USING (value)"
        ).df())  # fmt: skip
    for kind in ("segment", "denoise_step"):
        column = store.ids(site)[:, IDS.index(kind)].numpy()
        value, counts = np.unique(column[column != NONE], return_counts=True)
        if not len(value):
            continue
        named = [store.names.segment[i] if kind == "segment" else str(i) for i in value.tolist()]
        duck.register("base", pa.table({"number": value, "of_all": counts / counts.sum(), "value": named}))
        parts.append(duck.sql(
            f"WITH own AS (SELECT feature, {kind} AS number, sum(value) AS total FROM activations WHERE {kind} <> "
            f"{NONE} GROUP BY ALL) SELECT feature, '{kind}' AS kind, base.value AS value, total / sum(total) OVER "
            "(PARTITION BY feature) AS share, share / of_all AS lift FROM own JOIN base USING (number)"
        ).df())  # fmt: skip
        duck.unregister("base")
    return pd.concat(parts).sort_values(["feature", "kind", "share", "value"], ascending=[True, True, False, True])


def _neighbour_table(duck: "duckdb.DuckDBPyConnection", sae: SparseAutoencoder, n_rows: int) -> pa.Table:
    m = sae.config.n_features
    n = min(N_NEIGHBOURS, m - 1)
    every = max(1, n_rows // COACTIVE_ROWS)
    pairs = duck.execute("SELECT row, feature FROM activations WHERE row % ? = 0", [every]).fetchnumpy()
    found = {
        "decoder": decoder_neighbours(sae.w_dec, n),
        "coactive": coactive_neighbours(pairs["row"].astype(np.int64), pairs["feature"].astype(np.int64), m, n),
    }
    tables = []
    for kind, each in found.items():
        there = ~np.isnan(each.value)
        feature, place = np.nonzero(there)
        tables.append(pa.table({
            "feature": feature.astype(np.int32), "kind": [kind] * len(feature), "place": place.astype(np.int32),
            "neighbour": each.feature[there].astype(np.int32), "value": each.value[there],
        }))  # fmt: skip
    return pa.concat_tables(tables)


def _direction_table(sae: SparseAutoencoder) -> pa.Table:
    rows = sae.w_dec.detach().float().cpu()
    found = principal_components(rows, min(N_COMPONENTS, *rows.shape))
    flat = np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))
    return pa.table({
        "feature": np.arange(len(rows), dtype=np.int32), "x": flat[:, 0], "y": flat[:, 1],
        "components": list(found), "sha256": [digest(row) for row in rows],
    })  # fmt: skip


def _feature_table(
    duck: "duckdb.DuckDBPyConnection", steps: FeatureSteps, shares: pd.DataFrame, concepts: list[Concept],
    n_rows: int, model: Generality, on: float,
) -> pa.Table:  # fmt: skip
    sums = duck.sql(
        f"SELECT feature, count(*) / {n_rows} AS density, max(value) AS maximum, avg(value) AS mean FROM activations "
        "GROUP BY feature"
    ).df()
    table = pd.DataFrame({"feature": np.arange(steps.n_features, dtype=np.int32)}).merge(sums, on="feature", how="left")
    table = table.fillna({"density": 0.0, "maximum": 0.0, "mean": 0.0})
    report = generality(steps, model, on)
    table["frames"] = report.statistics.frequency
    for name in ("coverage", "onsets", "magnitude", "run_length"):
        table[name] = getattr(report.statistics, name)
    table["general"], table["general_null"], table["general_p"] = report.probability, report.null, report.p_value
    told: dict[int, list[str]] = {}
    for concept in concepts:
        for each in concept.features:
            if each.is_confirmed:
                told.setdefault(each.feature, []).append(str(concept))
    own = {feature: [Share(*row) for row in zip(part["kind"], part["value"], part["share"], part["lift"], strict=True)]
           for feature, part in shares.groupby("feature")}  # fmt: skip
    table["description"] = [
        describe(own[feature], told.get(feature, ()), ["general" if p >= 0.5 else "memorised"])
        if feature in own else "never active"
        for feature, p in zip(table["feature"].tolist(), table["general"], strict=True)
    ]  # fmt: skip
    return pa.Table.from_pandas(table, preserve_index=False)
