"""Connections to DuckDB: one that threads share, one that reaches some folders alone, and those of an index."""

import glob
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hooked_vla.extras import needs_packages

with needs_packages(("duckdb",), "the index of features needs: pip install 'hooked-vla[sae]'"):
    import duckdb

TABLES = (
    "frames", "layout", "peaks", "shares", "concepts", "neighbours", "histograms", "directions", "features",
)  # fmt: skip
# no code is fetched, and no variable of Python's is a table
_CLOSED = ("autoinstall_known_extensions", "autoload_known_extensions", "python_enable_replacements")


def exactly(path: str | Path) -> str:
    """A path for read_parquet, which takes brackets, stars and question marks for a pattern of paths."""
    return glob.escape(str(path))


# rows of the files that a query is given, with their numbers; a folder that is called "k=3" adds no column
FILE_ROWS = "read_parquet(?, hive_partitioning = false)"
NUMBERED_ROWS = "read_parquet(?, hive_partitioning = false, file_row_number = true)"


class Shared:
    """The connection that cursors are of; it refuses a second call while one is under way, so they take turns."""

    def __init__(self, connection: "duckdb.DuckDBPyConnection") -> None:
        self._connection, self._turn = connection, threading.Lock()

    def cursor(self) -> "duckdb.DuckDBPyConnection":
        """A cursor of its own for one answer. Raises duckdb.ConnectionException once the connection is closed."""
        with self._turn:
            return self._connection.cursor()

    def close(self, seconds: float = 5.0) -> None:
        """Close the connection and its cursors, ending the queries that run on them; after so long it is left as it
        is."""
        with self._turn:
            ends = time.monotonic() + seconds
            while True:
                try:
                    self._connection.close()
                    return
                except duckdb.Error:
                    # a cursor of it is busy in another thread
                    if time.monotonic() > ends:
                        return
                    with suppress(duckdb.Error):
                        self._connection.interrupt()
                    time.sleep(0.02)


def confined(
    folders: Sequence[Path], memory: str, threads: int, spill: Path | None = None
) -> "duckdb.DuckDBPyConnection":
    """A connection that reaches files of some folders alone, and no network.

    folders: absolute, since files' names are compared with them. spill: folder for what does not fit into memory,
    DuckDB's own choice where None.
    """
    places = {} if spill is None else {"temp_directory": str(spill.absolute())}
    duck = duckdb.connect(
        config={**dict.fromkeys(_CLOSED, False), "memory_limit": memory, "threads": threads, **places}
    )
    # a path as `exactly` gives it is compared before it is resolved, and each file that it names after
    allowed = dict.fromkeys(f"{each}/" for folder in folders for each in (folder, exactly(folder)))
    duck.execute("SET allowed_directories = ?", [list(allowed)])
    duck.execute("SET enable_external_access = false")
    return duck


def open_index(folder: Path, memory: str, spill: Path) -> Shared:
    """A connection that has the tables of an index by name, and reaches nothing else. spill: as of `confined`."""
    folder = folder.absolute()
    # one thread: sums are the same every time
    duck = confined([folder], memory, 1, spill)
    _view_all(duck, folder)
    return Shared(duck)


@contextmanager
def connect(folder: Path, memory: str) -> "Iterator[duckdb.DuckDBPyConnection]":
    """DuckDB with the tables of an index as far as they are there; what does not fit into memory goes to disk beside
    them. Nothing is downloaded."""
    # one thread: sums are the same every time
    settings = {"memory_limit": memory, "temp_directory": str(spill_of(folder)), "threads": 1,
                "autoinstall_known_extensions": False}  # fmt: skip
    duck = duckdb.connect(config=settings)
    try:
        _view_all(duck, folder)
        yield duck
    finally:
        duck.close()
        shutil.rmtree(spill_of(folder), ignore_errors=True)


def spill_of(folder: Path) -> Path:
    """Where this process puts what does not fit into memory, in an index's folder."""
    return folder / f".spill-{os.getpid()}"


def view(duck: "duckdb.DuckDBPyConnection", folder: Path, name: str) -> None:
    """Let a table of an index be asked by its name, where it is there."""
    if any(folder.glob(files := "activations/*.parquet" if name == "activations" else f"{name}.parquet")):
        quoted = f"{exactly(folder)}/{files}".replace("'", "''")
        duck.execute(
            f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet('{quoted}', hive_partitioning = false)"
        )


def _view_all(duck: "duckdb.DuckDBPyConnection", folder: Path) -> None:
    for name in (*TABLES, "activations"):
        view(duck, folder, name)
