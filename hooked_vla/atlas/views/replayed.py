"""What a worker makes of recorded episodes: folders that are made when they are first asked for, and kept in the run's
cache, so many bytes of them; and how an export shares its bounds out."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hooked_vla.atlas.run import Run
from hooked_vla.atlas.worker import Refused, Worker, WorkError

T = TypeVar("T")


def replays(run: Run) -> Worker:
    """The run's worker for replays: films, camera images and attention."""
    return run.keep("replays", lambda: Worker("replay"))


def made_folder(
    run: Run, task: str, out: Path, about: str, asked: Mapping[str, Any], seconds: float, max_bytes: int
) -> tuple[Path, dict[str, Any]]:
    """A folder that a task of the worker makes, now if need be, and what its file `about` says.

    out: in the cache, under a name of all that it depends on, beside others of its kind, at most max_bytes together;
    asked: the task's arguments besides it.
    Raises WorkError: what was refused once is not tried again as long as the run is open, what failed otherwise is.
    """
    refused = run.keep("refused replays", dict[Path, str])
    if out in refused:
        raise Refused(refused[out])
    if not (out / about).is_file():
        try:
            replays(run).run(task, {**asked, "out": str(out)}, seconds)
        except WorkError as error:
            # two that ask for the same: the second finds it made
            if not (out / about).is_file():
                if error.final:
                    refused[out] = str(error)
                raise
        _bound(out.parent, out, max_bytes)
    with suppress(OSError):
        os.utime(out)
    return out, json.loads((out / about).read_text())


def _bound(folder: Path, keep: Path, max_bytes: int) -> None:
    """Remove what was looked at longest ago, until the others fit."""
    sizes: dict[Path, tuple[float, int]] = {}
    for each in folder.iterdir():
        # another process may remove it meanwhile
        with suppress(OSError), os.scandir(each) as files:
            sizes[each] = each.stat().st_mtime, sum(file.stat().st_size for file in files)
    total = sum(size for _, size in sizes.values())
    for each in sorted(sizes, key=lambda one: sizes[one][0]):
        if total <= max_bytes:
            return
        if each != keep:
            shutil.rmtree(each, ignore_errors=True)
            total -= sizes[each][1]


def fair(groups: Iterable[Iterable[T]], total: int) -> Iterator[T]:
    """So many items in all, group by group: no group has a second one while another lacks its first, and so on."""
    lists = [list(each) for each in groups]
    turns = sorted((at, group) for group, items in enumerate(lists) for at in range(len(items)))
    for group, at in sorted((group, at) for at, group in turns[:total]):
        yield lists[group][at]
