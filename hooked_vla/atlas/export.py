"""A copy of the page that needs no server: every answer that the views list, as a script beside it.

FOLDER/index.html, *.js, *.css
FOLDER/data/index.js           which answers there are
FOLDER/data/<path>.js          one answer; <path>.png, .jpg, .mp4: media
FOLDER/atlas-export.json       that the folder is such a copy, which another may then replace
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hooked_vla.atlas.app import to_json
from hooked_vla.atlas.page import assets, document
from hooked_vla.atlas.routes import Media, Route
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import all_routes, first_view
from hooked_vla.folders import new_folder, write_file, write_json

MARKER = "atlas-export.json"
FORMAT = "hooked-vla atlas export 1"
# a file's own scheme is named, as 'self' is nothing to a page without an origin; connect-src: no request at all
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file: 'unsafe-inline'; "
    "img-src 'self' file: data: blob:; media-src 'self' file: blob:; base-uri 'none'; form-action 'none'"
)
_SEGMENT = re.compile(r"(?!\.+$)[A-Za-z0-9._,=+@~-]{1,200}")


@dataclass(frozen=True)
class Exported:
    """files: how many answers were written; errors: those that could not be had, each with its path."""

    files: int
    errors: tuple[str, ...]


def export_run(run: Run, folder: str | Path, replays: bool = True, progress: bool = False) -> Exported:
    """Write a copy of the page; it appears when it is complete, in place of an earlier copy.

    replays: with what is made by running episodes again, at some seconds each: films, attention, and what a feature's
    policy saw. What a view cannot tell (a damaged file) is an error in the copy too, as on the page. progress: count
    the answers on standard error.
    Raises FileExistsError for a folder that holds anything but such a copy, ValueError for one within the run.
    """
    target = Path(folder).resolve()
    if target.is_relative_to(run.root):
        raise ValueError(f"{folder} is within the run: choose a folder outside of {run.root}")
    if target.exists() and not (target / MARKER).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{folder} holds something other than a copy of the page: choose another folder")
    with new_folder(target) as temporary, tqdm(unit=" answers", disable=not progress) as bar:
        return _write(run, temporary, replays, bar)


def _write(run: Run, folder: Path, replays: bool, bar: "tqdm[Any]") -> Exported:
    for name, path in assets(live=False).items():
        shutil.copyfile(path, folder / name)
    paths, errors = [], []
    for route in all_routes(live=False):
        if route.replays and not replays:
            continue
        try:
            listed = list(route.listing(run)) if route.listing is not None else []
        except Exception as problem:
            # one damaged folder must not keep the rest from being shown
            errors.append(f"{route.path}: {type(problem).__name__}: {problem}")
            continue
        for parameters in listed:
            bar.update()
            path = route.path.format(**parameters)
            if not all(_SEGMENT.fullmatch(part) for part in path.split("/")):
                errors.append(f"{path}: not a name that a file can have")
                continue
            error = _answer(run, route, dict(parameters), path, folder / "data")
            paths.append(path)
            if error is not None:
                errors.append(f"{path}: {error}")
    write_file(folder / "data" / "index.js", b"window.atlasPaths = " + to_json(sorted(paths)) + b";\n")
    about = {"live": False, "simulates": False, "run": run.root.name, "home": first_view(run)}
    page = document(about, live=False, policy=POLICY, data=True)
    write_file(folder / "index.html", page.encode())
    write_json(folder / MARKER, {"format": FORMAT, "run": run.root.name, "answers": len(paths)})
    return Exported(len(paths), tuple(errors))


def _answer(run: Run, route: Route, parameters: dict[str, str], path: str, folder: Path) -> str | None:
    """Write one answer; what was wrong with it, if anything."""
    error = None
    try:
        found = route.get(run, **parameters)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
        found = {"__error": error}
    if isinstance(found, Media):
        write_file(folder / f"{path}.{route.suffix}", found.content)
    else:
        name = json.dumps(path).encode()
        write_file(folder / f"{path}.js", b"atlas.receive(" + name + b", " + to_json(found) + b");\n")
    return error
