"""Reading an index of features: see index.py for what is in it and how it is made."""

import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.folders import read_manifest
from hooked_vla.rollouts.sae.duck import FILE_ROWS, TABLES, Shared, exactly, open_index, spill_of
from hooked_vla.rollouts.sae.feature_page import Html, feature_page
from hooked_vla.sae.descriptions import TextSearch
from hooked_vla.sae.rows import NONE

with needs_analysis_extra():
    import pandas as pd

FORMAT = "hooked-vla feature index 2"
MANIFEST, COMPLETE = "manifest.json", "complete"
# what a plan is labelled with
_LABELS = "frames.* EXCLUDE (episode, env_step, first_row, last_row)"
# of the histograms of features' values
N_BINS = 40
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


class Feature(Mapping[str, Any]):
    """A feature's row of the table of features, by column; `show` shows all that the index has of it."""

    def __init__(self, index: "FeatureIndex", values: Mapping[str, Any]) -> None:
        self.index, self._values = index, dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"feature {self['feature']} of {self.index.site}: {self['description']}"

    def show(self, n: int = 4) -> Html:
        """A page for a notebook: figures, histogram, labels, like features, and the n plans in which it is largest,
        token by token. Raises ValueError for n below 0."""
        return feature_page(self.index, self, n)


class FeatureIndex:
    """An index that `build_index` made. site, model, n_features: of the autoencoder; manifest: all that it says.

    Tables come as data frames, best first. `sql` asks anything else of the tables in TABLES and of `activations`. One
    connection to DuckDB is held until `close`; it reads the index's folder alone, from any thread.
    """

    def __init__(self, folder: str | Path, memory: str = "2GB", spill: str | Path | None = None) -> None:
        """spill: folder for what a query does not hold in memory, one in the index's where None.

        Raises FileNotFoundError for a folder without an index, ValueError for one that is damaged or unfinished."""
        self.folder, self.memory = Path(folder), memory
        self._spill = spill_of(self.folder) if spill is None else Path(spill)
        self.manifest = read_manifest(self.folder / MANIFEST, FORMAT, "an index of features")
        if not self.manifest[COMPLETE]:
            raise ValueError(f"the index {folder} is not complete: run what makes it again")
        missing = [name for name in TABLES if not (self.folder / f"{name}.parquet").is_file()]
        if missing:
            raise ValueError(f"the index {folder} is damaged: {missing} are missing; remove it and make it again")
        self.site: str = self.manifest["site"]
        self.model: str = self.manifest["model"]
        self.n_features: int = self.manifest["n_features"]
        self._duck: Shared | None = None
        self._lock = threading.Lock()

    def sql(self, query: str, parameters: Sequence[Any] | None = None) -> pd.DataFrame:
        """What DuckDB answers. Raises duckdb.Error for a query that it does not understand, and damaged files."""
        with self._lock:
            if self._duck is None:
                self._duck = open_index(self.folder, self.memory, self._spill)
            duck = self._duck.cursor()
        try:
            return duck.execute(query, parameters or []).df()
        finally:
            duck.close()

    def close(self) -> None:
        """Let go of the connection; the next query makes another."""
        with self._lock:
            if self._duck is not None:
                self._duck.close()
                self._duck = None
                shutil.rmtree(self._spill, ignore_errors=True)

    def features(self, sort: str = "density", n: int | None = None) -> pd.DataFrame:
        """All features (or n) by a column of the table of features, largest first; those without a value last.

        Raises ValueError for another column.
        """
        columns = self.sql("SELECT * FROM features LIMIT 0").columns
        if sort not in columns:
            raise ValueError(f"features cannot be sorted by {sort!r}; columns: {list(columns)}")
        limit = "" if n is None else f" LIMIT {int(n)}"
        return self.sql(f'SELECT * FROM features ORDER BY "{sort}" DESC NULLS LAST, feature{limit}')

    def feature(self, feature: int) -> Feature:
        """A feature's row of the table of features. Raises ValueError for one that there is not."""
        self._check(feature)
        row = self.sql("SELECT * FROM features WHERE feature = ?", [feature]).to_dict("records")[0]
        return Feature(self, {str(name): value for name, value in row.items()})

    def top_frames(self, feature: int, n: int = 10, per_episode: int | None = None) -> pd.DataFrame:
        """The plans in which a feature is largest: episode, env_step, maximum, n_active rows of n_rows, labels.

        per_episode: at most so many of one episode. Raises ValueError for a feature that there is not.
        """
        self._check(feature)
        order = "maximum DESC, episode, env_step"
        own = f"SELECT * EXCLUDE feature FROM peaks WHERE feature = ? ORDER BY {order} LIMIT ?"
        n_first = n
        if per_episode is not None:
            # so many rows have n of different episodes, if there are as many
            n_first = n * self._most_plans
            place = "row_number() OVER (PARTITION BY episode ORDER BY maximum DESC, env_step)"
            own = f"SELECT * FROM ({own}) QUALIFY {place} <= {int(per_episode)} ORDER BY {order} LIMIT {int(n)}"
        return self.sql(
            f"WITH best AS ({own}) SELECT best.*, {_LABELS} FROM best JOIN frames USING (episode, env_step) "
            f"ORDER BY {order}",
            [feature, n_first],
        )

    def sampled_frames(self, feature: int, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> pd.DataFrame:
        """Plans across all in which a feature is active, one at each share of them when the largest come first: what
        the largest alone would hide. Columns as of `top_frames`, with share.

        Raises ValueError for a feature that there is not, and shares outside 0..1.
        """
        self._check(feature)
        if wrong := [each for each in shares if not 0 <= each <= 1]:
            raise ValueError(f"shares must be in 0..1, got {wrong}")
        n = int(self.sql("SELECT count(*) AS n FROM peaks WHERE feature = ?", [feature]).iat[0, 0])
        places = {round(each * (n - 1)) + 1: each for each in shares} if n else {}
        found = self.sql(
            "WITH ranked AS (SELECT * EXCLUDE feature, row_number() OVER (ORDER BY maximum DESC, episode, env_step) AS "
            "place FROM peaks WHERE feature = ? QUALIFY list_contains(?, place)) "
            f"SELECT ranked.*, {_LABELS} FROM ranked JOIN frames USING (episode, env_step) ORDER BY place",
            [feature, list(places)],
        )
        found["share"] = [places[place] for place in found.pop("place").tolist()]
        return found

    def course(self, feature: int, episodes: Sequence[int]) -> pd.DataFrame:
        """A feature over some episodes, in their order: episode, env_step, maximum over the plan's rows (0 where it is
        not active), labels.

        Raises ValueError for a feature or an episode that there is not.
        """
        self._check(feature)
        found = self.sql(
            "WITH wanted AS (SELECT unnest(?::BIGINT[]) AS episode, generate_subscripts(?::BIGINT[], 1) AS place), "
            "own AS (SELECT episode, env_step, maximum FROM peaks SEMI JOIN wanted USING (episode) WHERE feature = ?) "
            f"SELECT episode, env_step, coalesce(maximum, 0) AS maximum, {_LABELS} FROM frames "
            "JOIN wanted USING (episode) LEFT JOIN own USING (episode, env_step) ORDER BY place, env_step",
            [list(episodes), list(episodes), feature],
        )
        if missing := sorted(set(episodes) - set(found["episode"].tolist())):
            raise ValueError(f"no episodes {missing[:5]} in the index")
        return found

    def histogram(self, feature: int) -> tuple[Int64[np.ndarray, " bin"], float]:
        """How many rows a feature has in each of N_BINS equal bins from 0 to its maximum, and that maximum.

        Raises ValueError for a feature that there is not.
        """
        self._check(feature)
        table = self.sql(
            "SELECT maximum, bin, count FROM features LEFT JOIN histograms USING (feature) WHERE feature = ?", [feature]
        )
        counts = np.zeros(N_BINS, np.int64)
        filled = table.dropna()
        counts[filled["bin"].to_numpy(np.int64)] = filled["count"].to_numpy(np.int64)
        return counts, float(table["maximum"].iat[0])

    def top_episodes(self, feature: int, n: int = 10) -> pd.DataFrame:
        """The episodes in which a feature is largest: its maximum, where that is, and the share of plans in which it is
        active. Raises ValueError for a feature that there is not."""
        self._check(feature)
        return self.sql(
            "WITH own AS (SELECT episode, max(maximum) AS maximum, arg_max(env_step, maximum) AS env_step, count(*) AS "
            "active FROM peaks WHERE feature = ? GROUP BY episode ORDER BY maximum DESC, episode LIMIT ?), whole AS "
            "(SELECT episode, count(*) AS plans, any_value(task) AS task, any_value(seed) AS seed FROM frames "
            "SEMI JOIN own USING (episode) GROUP BY episode) SELECT episode, maximum, env_step, "
            "active / plans AS active, task, seed FROM own JOIN whole USING (episode) ORDER BY maximum DESC, episode",
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
        return self.heat_maps(feature, [(episode, env_step)])[0]

    def heat_maps(self, feature: int, plans: Sequence[tuple[int, int]]) -> list[list[HeatMap]]:
        """`heat_map` of several plans, each an episode and an environment step. Raises as that."""
        self._check(feature)
        episodes, env_steps = [list(each) for each in zip(*plans, strict=True)] if plans else ([], [])
        wanted = "(SELECT unnest(?) AS episode, unnest(?) AS env_step)"
        rows = self.sql(
            f"SELECT episode, env_step, first_row, last_row FROM frames JOIN {wanted} USING (episode, env_step)",
            [episodes, env_steps],
        ).to_numpy(np.int64)
        there = {(episode, step) for episode, step, *_ in rows.tolist()}
        if missing := [plan for plan in plans if plan not in there]:
            raise ValueError(f"no plan at episode {missing[0][0]}, environment step {missing[0][1]}")
        if self.manifest["pooling"] != "token":
            raise ValueError(f"the index is of rows pooled by {self.manifest['pooling']!r}: they have no tokens")
        if not plans:
            return []
        layout = self.sql(
            "SELECT episode, segment, camera, position FROM layout SEMI JOIN (SELECT unnest(?) AS episode) "
            "USING (episode) ORDER BY ALL",
            [episodes],
        ).to_numpy(np.int64)
        spans = (rows[:, 2:] // self.manifest["block_rows"]).tolist()
        blocks = {block for first, last in spans for block in range(first, last + 1)}
        rows_of = self.folder.absolute() / "activations"
        files = [exactly(rows_of / f"{block:06d}.parquet") for block in sorted(blocks)]
        active = self.sql(
            f"SELECT episode, env_step, segment, denoise_step, position, value FROM {FILE_ROWS} "
            f"JOIN {wanted} USING (episode, env_step) WHERE feature = ?",
            [files, episodes, env_steps, feature],
        )
        ids, values = active.iloc[:, :5].to_numpy(np.int64), active["value"].to_numpy()
        found = []
        for plan in plans:
            own = (ids[:, :2] == plan).all(1)
            found.append(self._maps(layout[layout[:, 0] == plan[0], 1:], ids[own, 2:], values[own]))
        return found

    def _maps(self, layout: np.ndarray, ids: np.ndarray, values: np.ndarray) -> list[HeatMap]:
        """layout: segment, camera and position of all tokens; ids: segment, denoise step and position of values."""
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
    def _most_plans(self) -> int:
        """Of one episode."""
        return int(self.sql("SELECT max(n) FROM (SELECT count(*) AS n FROM frames GROUP BY episode)").iat[0, 0])

    @cached_property
    def _descriptions(self) -> tuple[list[int], list[str]]:
        table = self.sql("SELECT feature, description FROM features WHERE density > 0 ORDER BY feature")
        return table["feature"].tolist(), table["description"].tolist()

    def prepare_search(self) -> None:
        """Read the descriptions, as the first `search` does otherwise."""
        _ = self._texts

    @cached_property
    def _texts(self) -> TextSearch:
        return TextSearch(dict(zip(*self._descriptions, strict=True)))

    def _name(self, kind: str, number: Any, none: Any) -> Any:
        return none if number == NONE else self.manifest["names"][kind][int(number)]

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.n_features:
            raise ValueError(f"no feature {feature}: the SAE of {self.site} has 0..{self.n_features - 1}")
