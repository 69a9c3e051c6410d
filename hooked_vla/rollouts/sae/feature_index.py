"""Reading an index of features: see index.py for what is in it and how it is made."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from hooked_vla.extras import needs_analysis_extra, needs_packages
from hooked_vla.sae.descriptions import TextSearch
from hooked_vla.sae.rows import NONE

with needs_packages(("duckdb",), "the index of features needs: pip install 'hooked-vla[sae]'"):
    import duckdb
with needs_analysis_extra():
    import pandas as pd

FORMAT = "hooked-vla feature index 1"
MANIFEST, COMPLETE = "manifest.json", "complete"
TABLES = ("frames", "layout", "peaks", "shares", "concepts", "neighbours", "features")
NEIGHBOURS = ("decoder", "coactive")


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A feature over the tokens of one segment at one plan. position: of the tokens, as in sae/rows.py; value: at
    every denoise step (one where there are none) and token, 0 where it is not active; camera: None but for images."""

    segment: str
    camera: str | None
    denoise_steps: tuple[int, ...]
    position: Int64[np.ndarray, " token"]
    value: Float32[np.ndarray, "step token"]

    def grid(self) -> Float32[np.ndarray, "step row column"]:
        """The tokens of an image as a square, in rows from the top left.

        Raises ValueError for a number of tokens that is no square's.
        """
        side = round(len(self.position) ** 0.5)
        if side * side != len(self.position):
            raise ValueError(f"{self.segment} has {len(self.position)} tokens, which are no square")
        return self.value.reshape(-1, side, side)


class FeatureIndex:
    """An index that `build_index` made. site, model, n_features: of the autoencoder; manifest: all that it says.

    Tables come as data frames, best first. `sql` asks anything else of the tables in TABLES and of `activations`.
    """

    def __init__(self, folder: str | Path, memory: str = "2GB") -> None:
        """Raises FileNotFoundError for a folder without an index, ValueError for one that is damaged or unfinished."""
        self.folder, self.memory = Path(folder), memory
        self.manifest = read_manifest(self.folder)
        if not self.manifest[COMPLETE]:
            raise ValueError(f"the index {folder} is not complete: run what makes it again")
        missing = [name for name in TABLES if not (self.folder / f"{name}.parquet").is_file()]
        if missing:
            raise ValueError(f"the index {folder} is damaged: {missing} are missing; remove it and make it again")
        self.site: str = self.manifest["site"]
        self.model: str = self.manifest["model"]
        self.n_features: int = self.manifest["n_features"]

    def sql(self, query: str, parameters: list[Any] | None = None) -> pd.DataFrame:
        """What DuckDB answers. Raises duckdb.Error for a query that it does not understand."""
        with connect(self.folder, self.memory) as duck:
            return duck.execute(query, parameters or []).df()

    def features(self, sort: str = "density", n: int | None = None) -> pd.DataFrame:
        """All features (or n) by a column of the table of features, largest first; those without a value last.

        Raises ValueError for another column.
        """
        columns = self.sql("SELECT * FROM features LIMIT 0").columns
        if sort not in columns:
            raise ValueError(f"features cannot be sorted by {sort!r}; columns: {list(columns)}")
        limit = "" if n is None else f" LIMIT {int(n)}"
        return self.sql(f'SELECT * FROM features ORDER BY "{sort}" DESC NULLS LAST, feature{limit}')

    def feature(self, feature: int) -> dict[str, Any]:
        """A feature's row of the table of features. Raises ValueError for one that there is not."""
        self._check(feature)
        row = self.sql("SELECT * FROM features WHERE feature = ?", [feature]).to_dict("records")[0]
        return {str(name): value for name, value in row.items()}

    def top_frames(self, feature: int, n: int = 10, per_episode: int | None = None) -> pd.DataFrame:
        """The plans in which a feature is largest: episode, env_step, maximum, n_active rows of n_rows, labels.

        per_episode: at most so many of one episode. Raises ValueError for a feature that there is not.
        """
        self._check(feature)
        first = "row_number() OVER (PARTITION BY episode ORDER BY maximum DESC, env_step)"
        kept = "" if per_episode is None else f"QUALIFY {first} <= {int(per_episode)} "
        return self.sql(
            "SELECT peaks.* EXCLUDE feature, frames.* EXCLUDE (episode, env_step) FROM peaks JOIN frames "
            f"USING (episode, env_step) WHERE feature = ? {kept}ORDER BY maximum DESC, episode, env_step LIMIT ?",
            [feature, n],
        )

    def top_episodes(self, feature: int, n: int = 10) -> pd.DataFrame:
        """The episodes in which a feature is largest: its maximum, where that is, and the share of plans in which it is
        active. Raises ValueError for a feature that there is not."""
        self._check(feature)
        return self.sql(
            "WITH whole AS (SELECT episode, count(*) AS plans, any_value(task) AS task, any_value(seed) AS seed "
            "FROM frames GROUP BY episode) SELECT episode, max(maximum) AS maximum, arg_max(env_step, maximum) AS "
            "env_step, count(*) / any_value(plans) AS active, any_value(task) AS task, any_value(seed) AS seed FROM "
            "peaks JOIN whole USING (episode) WHERE feature = ? GROUP BY episode ORDER BY maximum DESC, episode "
            "LIMIT ?",
            [feature, n],
        )

    def shares(self, feature: int) -> pd.DataFrame:
        """How a feature's activation is spread: kind, value, share, lift. Raises ValueError for no such feature."""
        self._check(feature)
        return self.sql("SELECT * EXCLUDE feature FROM shares WHERE feature = ? ORDER BY kind, share DESC", [feature])

    def concepts(self, feature: int) -> pd.DataFrame:
        """The labels that a feature was chosen for. Raises ValueError for a feature that there is not."""
        self._check(feature)
        return self.sql("SELECT * EXCLUDE feature FROM concepts WHERE feature = ? ORDER BY score DESC", [feature])

    def ranking(self, concept: str | None = None) -> tuple[list[int], list[int]]:
        """Features to edit, the best first, and all that are ever active.

        concept: as in "phase=grasp": those that were chosen for it, by their score; None: all, by density.
        Raises ValueError for a concept that no feature was chosen for, with those that there are.
        """
        alive = self.sql("SELECT feature FROM features WHERE density > 0 ORDER BY density DESC, feature")
        found = alive["feature"].tolist()
        if concept is None:
            return found, found
        told = self.sql("SELECT kind || '=' || value AS concept, feature FROM concepts ORDER BY score DESC, feature")
        both = zip(told["concept"].tolist(), told["feature"].tolist(), strict=True)
        chosen = [feature for name, feature in both if name == concept]
        if not chosen:
            there = sorted(set(told["concept"].tolist()))
            raise ValueError(f"no features were chosen for {concept!r}; concepts of {self.folder}: {there}")
        return chosen, found

    def neighbours(self, feature: int, kind: str = "decoder") -> pd.DataFrame:
        """The features nearest to one, with their descriptions. kind: one of NEIGHBOURS.

        Raises ValueError for another kind, and a feature that there is not.
        """
        self._check(feature)
        if kind not in NEIGHBOURS:
            raise ValueError(f"kind must be one of {', '.join(NEIGHBOURS)}, got {kind!r}")
        return self.sql(
            "SELECT neighbour, value, description FROM neighbours JOIN features ON neighbours.neighbour = "
            "features.feature WHERE neighbours.feature = ? AND kind = ? ORDER BY place",
            [feature, kind],
        )

    def heat_map(self, feature: int, episode: int, env_step: int) -> list[HeatMap]:
        """A feature over the tokens of a plan, segment by segment.

        Raises ValueError for a feature or plan that there is not, and for an index of means, which have no tokens.
        """
        self._check(feature)
        place = [episode, env_step]
        if self.sql("SELECT 1 FROM frames WHERE episode = ? AND env_step = ?", place).empty:
            raise ValueError(f"no plan at episode {episode}, environment step {env_step}")
        if self.manifest["pooling"] != "token":
            raise ValueError(f"the index is of rows pooled by {self.manifest['pooling']!r}: they have no tokens")
        columns = "segment, camera, position"
        layout = self.sql(f"SELECT {columns} FROM layout WHERE episode = ? ORDER BY ALL", [episode]).to_numpy(np.int64)
        active = self.sql(
            "SELECT segment, denoise_step, position, value FROM activations WHERE feature = ? AND episode = ? AND "
            "env_step = ?", [feature, *place],
        )  # fmt: skip
        ids, values = active[["segment", "denoise_step", "position"]].to_numpy(np.int64), active["value"].to_numpy()
        steps = np.array(sorted(self.manifest["denoise_steps"]), np.int64)
        shown = tuple(each for each in steps.tolist() if each != NONE)
        found = []
        for segment, camera in sorted({(each[0], each[1]) for each in layout.tolist()}):
            position = layout[(layout[:, :2] == (segment, camera)).all(1), 2]
            value = np.zeros((len(steps), len(position)), np.float32)
            own = ids[:, 0] == segment
            value[np.searchsorted(steps, ids[own, 1]), np.searchsorted(position, ids[own, 2])] = values[own]
            names = self._name("segment", segment, "all"), self._name("camera", camera, None)
            found.append(HeatMap(*names, shown, position, value))
        return found

    def search(self, query: str, n: int = 10) -> pd.DataFrame:
        """The features whose descriptions fit a query best: feature, score, description.

        Raises ValueError for a query without words.
        """
        found = self._texts(query, n)
        texts = {feature: text for feature, text in zip(*self._descriptions, strict=True)}
        return pd.DataFrame(
            [(feature, score, texts[feature]) for feature, score in found], columns=["feature", "score", "description"]
        )

    @cached_property
    def _descriptions(self) -> tuple[list[int], list[str]]:
        table = self.sql("SELECT feature, description FROM features WHERE density > 0 ORDER BY feature")
        return table["feature"].tolist(), table["description"].tolist()

    @cached_property
    def _texts(self) -> TextSearch:
        return TextSearch(dict(zip(*self._descriptions, strict=True)))

    def _name(self, kind: str, number: Any, none: Any) -> Any:
        return none if number == NONE else self.manifest["names"][kind][int(number)]

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.n_features:
            raise ValueError(f"no feature {feature}: the SAE of {self.site} has 0..{self.n_features - 1}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of an index says.

    Raises FileNotFoundError where there is none, ValueError for one that is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}: not an index of features")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT!r}")
    return found


@contextmanager
def connect(folder: Path, memory: str) -> "Iterator[duckdb.DuckDBPyConnection]":
    """DuckDB with the tables of an index as far as they are there; what does not fit into memory goes to disk beside
    them. Nothing is downloaded."""
    # one thread: sums are the same every time
    settings = {"memory_limit": memory, "temp_directory": str(folder / f".spill-{os.getpid()}"), "threads": 1,
                "autoinstall_known_extensions": False}  # fmt: skip
    duck = duckdb.connect(config=settings)
    try:
        for name in (*TABLES, "activations"):
            view(duck, folder, name)
        yield duck
    finally:
        duck.close()
        shutil.rmtree(folder / f".spill-{os.getpid()}", ignore_errors=True)


def view(duck: "duckdb.DuckDBPyConnection", folder: Path, name: str) -> None:
    """Let a table of an index be asked by its name, where it is there."""
    if any(folder.glob(files := "activations/*.parquet" if name == "activations" else f"{name}.parquet")):
        quoted = str(folder / files).replace("'", "''")
        duck.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet('{quoted}')")
