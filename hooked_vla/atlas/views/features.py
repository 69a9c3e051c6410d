"""Features of sparse autoencoders: which there are, how they lie, and all that an index has of one of them."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vla.atlas.projections import MIN_DIST, MIN_FEATURES, N_NEIGHBOURS
from hooked_vla.atlas.routes import NotThere, Route, once
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.feature_map import UMAP, get_map, projections_of
from hooked_vla.atlas.views.feature_steering import steering_of
from hooked_vla.atlas.views.opened_index import open_index, reading, rollouts_of, whole
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.sae.feature_index import NEIGHBOURS, FeatureIndex, HeatMap
from hooked_vla.sae.descriptions import LIFT, SHARE

with needs_analysis_extra():
    import pandas as pd

if TYPE_CHECKING:
    from hooked_vla.rollouts.sae.feature_index import Feature

PAGE = 200
# plans and episodes that a feature's page shows
PLANS, EPISODES = 6, 5
# features whose pages an export holds, of each index
EXPORTED = 200
# above it a feature counts as general (arXiv 2603.19183)
THRESHOLD = 0.5
_SAMPLES = (0.25, 0.5, 0.75)
FIGURES = ("density", "frames", "coverage", "general", "general_null", "general_p", "maximum", "mean", "onsets",
           "magnitude", "run_length")  # fmt: skip
_SORTS = ("feature", "density", "frames", "coverage", "general", "maximum", "mean")
_DIGITS = 5


def list_indexes(run: Run) -> list[dict[str, Any]]:
    """Every index of the run, damaged ones with what is wrong."""
    found = []
    for key, folder in run.indexes.items():
        row: dict[str, Any] = {"key": key, "path": run.shown(folder.path), "error": None}
        try:
            index = open_index(run, key)
            row |= {"site": index.site, "model": index.model, "n_features": index.n_features}
        except NotThere as error:
            row["error"] = str(error)
        found.append(row)
    return found


def get_index(run: Run, index: str) -> dict[str, Any]:
    """What an index is of, how many of its features do what, and what they tell. Raises NotThere."""
    with reading(run, index) as found:
        about = found.manifest
        counts = _rows(found.sql(
            "SELECT count(*) AS features, count(*) FILTER (density > 0) AS alive, count(*) FILTER (general >= ?) AS "
            "general FROM features", [THRESHOLD]
        ))[0]  # fmt: skip
        counts |= _rows(found.sql(
            "SELECT count(*) AS plans, count(DISTINCT episode) AS episodes, count(DISTINCT task) AS tasks, "
            "sum(n_rows)::BIGINT AS rows FROM frames"
        ))[0]  # fmt: skip
        told = found.sql("SELECT * FROM concepts ORDER BY kind, value, place")
        folder = rollouts_of(run, found)
        run.keep(f"search {index}", lambda: _prepared(found))
        return {
            "key": index, "path": run.shown(found.folder), "site": found.site, "model": found.model,
            "suite": about["about"].get("suite"), "pooling": about["pooling"], "counts": counts,
            "denoise_steps": [step for step in about["denoise_steps"] if step >= 0],
            "threshold": THRESHOLD, "generality": about["generality"], "concepts": _rows(told),
            "projections": projections_of(run, found), "umap": {"n_neighbors": N_NEIGHBOURS, "min_dist": MIN_DIST},
            "min_features": MIN_FEATURES, "rollouts": None if folder is None else folder.key, "exported": EXPORTED,
            "sorts": list(_SORTS), "file": f"{run.shown(found.folder)}/features.parquet",
        }  # fmt: skip


def _prepared(index: FeatureIndex) -> threading.Thread:
    """Descriptions are made ready to be searched while the reader looks at the map."""

    def prepare() -> None:
        # what is damaged is told when it is asked for
        with suppress(Exception):
            index.prepare_search()

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    return thread


def get_columns(run: Run, index: str) -> dict[str, Any]:
    """All features, column by column, feature 0 first; labels: of each kind, the one that a feature stands out by
    (number among its names; -1 where none does). Raises NotThere."""
    with reading(run, index) as found:
        return run.keep(f"columns {index}", lambda: _columns(found))


def _columns(index: FeatureIndex) -> dict[str, Any]:
    names = ("density", "frames", "coverage", "general", "general_null", "maximum")
    table = index.sql(f"SELECT feature, description, {', '.join(names)} FROM features ORDER BY feature")
    best = index.sql(
        "SELECT feature, kind, arg_max(value, lift * share) AS value FROM shares WHERE share >= ? AND lift >= ? "
        "GROUP BY ALL", [SHARE, LIFT]
    )  # fmt: skip
    labels = {}
    for kind, part in best.groupby("kind"):
        values = sorted(set(part["value"].tolist()), key=_natural)
        place = np.full(index.n_features, -1)
        place[part["feature"].to_numpy()] = [values.index(each) for each in part["value"].tolist()]
        labels[str(kind)] = {"names": values, "of": place.tolist()}
    numbers = {name: _rounded(table[name]) for name in names}
    return {"descriptions": table["description"].tolist(), **numbers, "labels": labels}


def find_features(run: Run, index: str, text: str = "", sort: str = "", page: str = "") -> dict[str, Any]:
    """A page of the features that a text finds (all where it is empty), by a column or by how well they fit.

    Raises NotThere, ValueError for an unknown column.
    """
    if sort and sort not in _SORTS:
        raise ValueError(f"features are sorted by {', '.join(_SORTS)}; got {sort!r}")
    number = max(1, whole(page or "1", "page"))
    columns = ", ".join(("features.feature", "description", *FIGURES))
    order = "score DESC, features.feature" if text.strip() and not sort else _order(sort or "density")
    with reading(run, index) as found:
        if text.strip():
            hits = _hits(found, text)
            source = "features JOIN (SELECT unnest(?) AS feature, unnest(?) AS score) AS hits USING (feature)"
            given: list[Any] = [[feature for feature, _ in hits], [score for _, score in hits]]
            total, columns = len(hits), f"{columns}, score"
        else:
            source, given, total = "features", [], found.n_features
        rows = found.sql(
            f"SELECT {columns} FROM {source} ORDER BY {order} LIMIT {PAGE} OFFSET ?", [*given, (number - 1) * PAGE]
        )
        pages = max(1, -(-total // PAGE))
        return {"rows": _rows(rows), "n": total, "page": number, "pages": pages}


def _order(sort: str) -> str:
    """sort: one of _SORTS."""
    return "feature" if sort == "feature" else f"{sort} DESC NULLS LAST, features.feature"


def _hits(index: FeatureIndex, text: str) -> list[tuple[int, float]]:
    """Number and score of what a text finds; a number finds the feature of that number first."""
    try:
        found = index.search(text, index.n_features)
    except ValueError:
        # no word in it
        return []
    hits = list(zip(found["feature"].tolist(), found["score"].tolist(), strict=True))
    if text.strip().isdecimal() and int(text) < index.n_features:
        own = int(text)
        top = max((score for _, score in hits), default=0.0)
        hits = [(own, top + 1.0), *(hit for hit in hits if hit[0] != own)]
    return hits


def get_feature(run: Run, index: str, feature: str) -> dict[str, Any]:
    """All that an index has of a feature. Raises NotThere."""
    number = whole(feature, "feature")
    with reading(run, index) as found:
        row = found.feature(number)
        counts, maximum = found.histogram(number)
        top, across = found.top_frames(number, PLANS, per_episode=1), found.sampled_frames(number, _SAMPLES)
        plans = plans_of(found, number, [*_rows(top), *_rows(across)])
        episodes = _rows(found.top_episodes(number, EPISODES))
        courses = found.course(number, [each["episode"] for each in episodes])
        return {
            "index": index, "site": found.site, "n_features": found.n_features,
            **{name: _plain(row[name]) for name in ("feature", "description", *FIGURES)},
            "histogram": {"counts": counts.tolist(), "maximum": maximum}, "rank": _rank(found, row),
            "shares": _rows(found.shares(number)), "concepts": _rows(found.concepts(number)),
            "neighbours": {kind: _rows(found.neighbours(number, kind)) for kind in NEIGHBOURS},
            "plans": {"top": plans[: len(top)], "across": plans[len(top) :]},
            "episodes": [
                each | {"course": _course(courses.loc[courses["episode"] == each["episode"]])} for each in episodes
            ],
            "files": run.shown(found.folder),
        }  # fmt: skip


def _rank(index: FeatureIndex, row: "Feature") -> dict[str, int]:
    """How many features are active more often, and how many are more general."""
    asked = "SELECT count(*) FILTER (density > ?) AS density, count(*) FILTER (general > ?) AS general FROM features"
    return _rows(index.sql(asked, [row["density"], row["general"]]))[0]


def _course(course: pd.DataFrame) -> dict[str, Any]:
    phases = [_plain(each) for each in course["phase"].tolist()] if "phase" in course else None
    return {"steps": course["env_step"].tolist(), "values": _rounded(course["maximum"]), "phases": phases}


def get_plan(run: Run, index: str, feature: str, episode: str, step: str) -> dict[str, Any]:
    """A feature over the tokens of one plan. Raises NotThere."""
    number, place = whole(feature, "feature"), (whole(episode, "episode"), whole(step, "step"))
    with reading(run, index) as found:
        course = found.course(number, [place[0]])
        rows = _rows(course.loc[course["env_step"] == place[1]])
        if not rows:
            raise NotThere(f"no plan at episode {place[0]}, environment step {place[1]}")
        return plans_of(found, number, rows)[0]


def plans_of(index: FeatureIndex, feature: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plans with their labels and heat maps; none of these for an index of means."""
    if index.manifest["pooling"] != "token":
        return [{**row, "maps": []} for row in rows]
    maps = index.heat_maps(feature, [(row["episode"], row["env_step"]) for row in rows])
    return [{**row, "maps": [_map(each) for each in found]} for row, found in zip(rows, maps, strict=True)]


def _map(found: HeatMap) -> dict[str, Any]:
    return {"segment": found.segment, "camera": found.camera, "denoise_steps": list(found.denoise_steps),
            "positions": found.position.tolist(), "values": [_rounded(each) for each in found.value]}  # fmt: skip


def get_steering(run: Run, index: str, feature: str) -> list[dict[str, Any]]:
    """What steering runs of a feature came to. Raises NotThere."""
    number = whole(feature, "feature")
    with reading(run, index) as found:
        found.feature(number)
        return steering_of(run, index, found, number)


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers by their size, before names."""
    return (0, float(text), "") if text.isdecimal() else (1, 0.0, text)


def _rounded(values: Any) -> list[float | None]:
    return [
        None if value != value else float(f"{value:.{_DIGITS}g}") for value in np.asarray(values, np.float64).tolist()
    ]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def exported_features(run: Run) -> Iterator[dict[str, str]]:
    """The features whose pages an export holds: those that were steered or tell a label, then the densest."""
    for each in _exported_indexes(run):
        key = each["index"]
        with reading(run, key) as found:
            listed = found.sql(
                "SELECT feature FROM features LEFT JOIN (SELECT feature, bool_or(is_confirmed) AS told FROM concepts "
                "GROUP BY feature) USING (feature) ORDER BY coalesce(told::INTEGER, -1) DESC, density DESC, feature"
            )["feature"].tolist()
        steered = [number for number in listed if steering_of(run, key, found, number, read=False)]
        for number in islice(dict.fromkeys([*steered, *listed]), EXPORTED):
            yield {"index": key, "feature": str(number)}


def _exported_indexes(run: Run) -> Iterator[dict[str, str]]:
    for row in list_indexes(run):
        if row["error"] is None:
            yield {"index": row["key"]}


def _exported_maps(run: Run) -> Iterator[dict[str, str]]:
    for each in _exported_indexes(run):
        with reading(run, each["index"]) as found:
            for name, state in projections_of(run, found).items():
                if name != UMAP or state in ("ready", "to be made"):
                    yield {**each, "projection": name}


ROUTES = [
    Route("features", list_indexes, listing=once),
    Route("features/{index}", get_index, listing=_exported_indexes),
    Route("features/{index}/columns", get_columns, listing=_exported_indexes),
    Route("features/{index}/map/{projection}", get_map, listing=_exported_maps),
    Route("features/{index}/find", find_features, query=("text", "sort", "page")),
    Route("features/{index}/feature/{feature}", get_feature, listing=exported_features),
    Route("features/{index}/feature/{feature}/plan/{episode}/{step}", get_plan),
    Route("features/{index}/feature/{feature}/steering", get_steering, listing=exported_features),
]
