"""The folder of one training run: what it was begun with, its state, its logs, and the autoencoders it made.

OUT/training.json        the configs, and what the rows are; locked while a process trains
OUT/state-000500/        what the run goes on from after 500 steps
OUT/<site>/log.csv       figures while training; with config.json and sae.safetensors when it is done
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hooked_vla.folders import lock, write_file, write_json
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.files import WEIGHTS

BEGUN, LOG = "training.json", "log.csv"
FORMAT = "hooked-vla sae training 2"
COLUMNS = ("step", "loss", "fvu", "l0", "aux", "dead", "rate")


def folder_names(configs: Sequence[SAEConfig]) -> list[str]:
    """Each autoencoder's folder: its site, with a number behind it where a site comes more than once."""
    sites = [config.site for config in configs]
    return [site if sites.count(site) == 1 else f"{site}-{sites[:i].count(site)}" for i, site in enumerate(sites)]


class RunFolder:
    """An open run folder; see `open`. of_each: the folder of each autoencoder."""

    def __init__(self, folder: Path, configs: Sequence[SAEConfig], main: bool) -> None:
        self.folder, self.main = folder, main
        self.of_each = [folder / name for name in folder_names(configs)]
        self._rows: list[list[list[float | int]]] = []

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, configs: Sequence[SAEConfig], main: bool, rows: Mapping[str, Any]
    ) -> "Iterator[RunFolder]":
        """The folder of a run with these configs, begun or gone on with; the main process locks it.

        rows: plain values that say what it is trained on.
        Raises ValueError where it was begun with others, naming what differs; BlockingIOError where another process
        trains there.
        """
        made = cls(folder, configs, main)
        if not main:
            yield made
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as opened:
            lock(opened, f"training in {folder}")
            made._claim(configs, rows)
            # what a killed process left
            for left in folder.glob(".state-*"):
                shutil.rmtree(left)
            yield made

    def _claim(self, configs: Sequence[SAEConfig], rows: Mapping[str, Any]) -> None:
        path = self.folder / BEGUN
        saes = [asdict(config) for config in configs]
        now = json.loads(json.dumps({"format": FORMAT, "saes": saes, "rows": dict(rows)}))
        if not path.is_file():
            write_json(path, now)
            return
        try:
            begun = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}; train into another folder") from error
        if found := list(_differences("", begun, now)):
            raise ValueError(
                f"{self.folder} was begun with other settings: {'; '.join(found[:5])}. Go on with those, or train into "
                "another folder"
            )

    def finished(self) -> bool:
        """Whether every autoencoder has been written, and no state waits to be gone on with."""
        return self.state() is None and all((folder / WEIGHTS).is_file() for folder in self.of_each)

    def state(self) -> tuple[int, Path] | None:
        """(steps, folder) of the last saved state."""
        states = sorted(self.folder.glob("state-*"))
        return (int(states[-1].name.split("-")[1]), states[-1]) if states else None

    def save(self, number: int, write: Callable[[Path], object], wait: Callable[[], None]) -> None:
        """A state under a temporary name, the log's rows, then the state under its own name; the one before goes.

        write: called in every process, with the folder to write to; wait: for all processes.
        """
        older = list(self.folder.glob("state-*"))
        temporary = self.folder / f".state-{number:09d}"
        write(temporary)
        wait()
        if not self.main:
            return
        # rows beyond the last state are forgotten, rows that it lacks would be lost
        for folder, rows in zip(self.of_each, zip(*self._rows, strict=True), strict=False):
            _append(folder / LOG, rows)
        self._rows = []
        temporary.replace(self.folder / f"state-{number:09d}")
        for path in older:
            if path.name != f"state-{number:09d}":
                shutil.rmtree(path)

    def note(self, rows: list[list[float | int]]) -> None:
        """A row of the log for each autoencoder, as in COLUMNS; they are written with the next state."""
        self._rows.append(rows)

    def forget_after(self, step: int) -> None:
        """Drop rows of steps that will be run again."""
        for folder in self.of_each if self.main else ():
            path = folder / LOG
            if path.is_file():
                header, *rows = path.read_text().splitlines()
                kept = [header, *(row for row in rows if int(row.split(",")[0]) <= step)]
                write_file(path, ("\n".join(kept) + "\n").encode())

    def finish(self, saes: Sequence[SparseAutoencoder]) -> None:
        """Write the autoencoders, then remove the state."""
        if not self.main:
            return
        for sae, folder in zip(saes, self.of_each, strict=True):
            sae.save_pretrained(folder)
        for path in self.folder.glob("state-*"):
            shutil.rmtree(path)


def _append(path: Path, rows: Sequence[Sequence[float | int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def _differences(path: str, begun: Any, now: Any) -> Iterator[str]:
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*begun, *now]):
            yield from _differences(f"{path}.{key}".strip("."), begun.get(key), now.get(key))
    elif isinstance(begun, list) and isinstance(now, list) and len(begun) == len(now):
        for i, (each, other) in enumerate(zip(begun, now, strict=True)):
            yield from _differences(f"{path}[{i}]", each, other)
    elif begun != now:
        yield f"{path}: {begun!r}, now {now!r}"
