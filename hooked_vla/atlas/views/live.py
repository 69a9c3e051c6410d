"""Live: one rollout at a time of a policy on this machine, unedited and edited side by side.

A session runs in a worker of its own, for so many steps and seconds at most; it ends when it is stopped, and when no
page listens any more. What it says is kept while it runs, so that a page that loads again sees it from its beginning.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import Conflict, Events, NotThere, Route
from hooked_vla.atlas.run import MAX_JSON, Run
from hooked_vla.atlas.views.episodes import sound_keys
from hooked_vla.atlas.worker import Worker, WorkError
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.files import CONFIG, SHIPPED, WEIGHTS, shipped_saes
from hooked_vla.weights import shipped_policies

SESSION_S = 300.0
OPTIONS_S = 120.0
MAX_STEPS = 400
MAX_EDITS = 4
# seconds without a listener after which a session ends: a page that loads again comes back sooner
ALONE_S = 8.0
_BEAT_S = 0.5
# folders below the run in which autoencoders are looked for
_DEPTH = 4
_EDITS = {"patch": ("site", "tokens", "task"), "ablate": ("site", "tokens"),
          "steer": ("sae", "feature", "tokens", "scale", "shift")}  # fmt: skip
_KEYS = ("model", "suite", "task", "seed", "prompt", "image", "edits", "max_steps")


class Session:
    """A run, from its start to its end. events: what it said so far; the last has "ended"."""

    def __init__(self, worker: Worker, asked: Mapping[str, Any]) -> None:
        self.events: list[dict[str, Any]] = []
        self.said = threading.Condition()
        self.over = False
        self._stop = threading.Event()
        self._listeners, self._alone_since = 0, time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(worker, asked), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def listen(self, by: int) -> None:
        """by: 1 for a listener that comes, -1 for one that goes."""
        with self.said:
            self._listeners += by
            self._alone_since = time.monotonic()

    def _cancelled(self) -> bool:
        with self.said:
            alone = self._listeners == 0 and time.monotonic() - self._alone_since > ALONE_S
        return self._stop.is_set() or alone

    def _run(self, worker: Worker, asked: Mapping[str, Any]) -> None:
        end: dict[str, Any] = {"ended": "done"}
        try:
            for kind, value in worker.stream("act", asked, SESSION_S, self._cancelled):
                if kind == "event":
                    self._say(value)
                elif kind == "done":
                    end |= value
        except WorkError as error:
            end = {"ended": "stopped"} if self._cancelled() else {"ended": "failed", "error": str(error)}
        except Exception as error:  # whatever it was: a page that waits must hear of it
            end = {"ended": "failed", "error": f"{type(error).__name__}: {error}"}
        finally:
            with self.said:
                self.over = True
            self._say(end)

    def _say(self, event: dict[str, Any]) -> None:
        with self.said:
            self.events.append(event)
            self.said.notify_all()


class Live:
    """The run's only place for a session."""

    def __init__(self) -> None:
        self.worker = Worker("live view")
        self.session: Session | None = None
        self._lock = threading.Lock()

    def start(self, asked: Mapping[str, Any]) -> None:
        """Raises Conflict while another session runs."""
        with self._lock:
            if self.session is not None and not self.session.over:
                raise Conflict("a rollout runs already: stop it first")
            self.session = Session(self.worker, asked)

    def close(self) -> None:
        if self.session is not None:
            self.session.stop()
        self.worker.close()
        if self.session is not None:
            self.session.join(5.0)


class Listener:
    """What a session says, from its beginning; None at least twice a second."""

    def __init__(self, session: Session) -> None:
        self.session, self._at, self._open = session, 0, True
        session.listen(1)

    def __iter__(self) -> "Listener":
        return self

    def __next__(self) -> dict[str, Any] | None:
        with self.session.said:
            if self._at == len(self.session.events):
                if self.session.over:
                    raise StopIteration
                self.session.said.wait(_BEAT_S)
            if self._at == len(self.session.events):
                return None
            event = self.session.events[self._at]
        self._at += 1
        return event

    def close(self) -> None:
        if self._open:
            self._open = False
            self.session.listen(-1)


def live_of(run: Run) -> Live:
    return run.keep("live", Live)


def get_options(run: Run) -> dict[str, Any]:
    """Models, suites with their tasks, changes of pictures, autoencoders, and limits."""
    session = live_of(run).session
    try:
        # asked once: while a session runs, its worker has no time for it
        known = run.keep("live options", lambda: live_of(run).worker.run("act_options", {"model": ""}, OPTIONS_S))
    except WorkError as error:
        raise NotThere(f"nothing can act here: {error}") from error
    found = {**known, "models": list(dict.fromkeys([*known["models"], *_local_models(run)]))}
    saes = [{key: value for key, value in sae.items() if key != "folder"} for sae in find_saes(run).values()]
    return found | {"saes": saes, "max_steps": MAX_STEPS, "max_edits": MAX_EDITS, "seconds": SESSION_S,
                    "running": session is not None and not session.over}  # fmt: skip


def get_sites(run: Run, model: str) -> dict[str, Any]:
    """Where a model can be edited, with the token segments there. Raises NotThere, Conflict while a session runs."""
    _known_model(run, model)
    session = live_of(run).session
    if session is not None and not session.over:
        raise Conflict("a rollout runs: its model's sites can be listed when it is over")
    try:
        return live_of(run).worker.run("act_options", {"model": model}, OPTIONS_S)
    except WorkError as error:
        raise NotThere(str(error)) from error


def post_start(run: Run, body: Mapping[str, Any]) -> dict[str, Any]:
    """Begin a session. Raises ValueError for what is not understood, Conflict while another runs."""
    asked = check_asked(body)
    _known_model(run, asked["model"])
    saes = find_saes(run)
    if unknown := [edit["sae"] for edit in asked["edits"] if edit["edit"] == "steer" and edit["sae"] not in saes]:
        raise ValueError(f"no autoencoder {unknown[0]!r} here; there is {list(saes)}")
    live_of(run).start(asked | {"saes": {name: sae["folder"] for name, sae in saes.items()}})
    return {"started": True}


def post_stop(run: Run, body: Mapping[str, Any]) -> dict[str, Any]:
    """Stop the session, if one runs."""
    session = live_of(run).session
    if session is not None:
        session.stop()
    return {"stopped": session is not None and not session.over}


def get_events(run: Run) -> Events:
    """The present session's events, or the last one's. Raises NotThere before the first."""
    session = live_of(run).session
    if session is None:
        raise NotThere("no rollout was started")
    return Events(Listener(session))


def check_asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a page asks a session to be, with nothing in it that is not understood.

    Raises ValueError naming the entry.
    """
    _only(body, _KEYS, "a rollout")
    asked: dict[str, Any] = {
        "model": _text(body, "model", 500), "suite": _text(body, "suite", 100), "task": _text(body, "task", 200),
        "seed": _whole(body, "seed", 0, 2**31 - 1), "max_steps": _whole(body, "max_steps", 1, MAX_STEPS),
        "prompt": None if body.get("prompt") is None else _text(body, "prompt", 300), "image": None, "edits": [],
    }  # fmt: skip
    if (image := body.get("image")) is not None:
        _only(image, ("kind", "strength"), "image")
        asked["image"] = {"kind": _text(image, "kind", 100), "strength": _number(image, "strength", 0.0, 10.0)}
    edits = body.get("edits", [])
    if not isinstance(edits, list) or len(edits) > MAX_EDITS:
        raise ValueError(f"edits: a list of at most {MAX_EDITS}")
    asked["edits"] = [_edit(edit) for edit in edits]
    return asked


def find_saes(run: Run) -> dict[str, dict[str, Any]]:
    """Autoencoders that come with the package, and those in the run's own folder: name, site, model, folder."""
    return run.keep("autoencoders", lambda: _find_saes(run))


def _find_saes(run: Run) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    places = {name: (SHIPPED / name, SHIPPED / name / CONFIG) for name in shipped_saes()}
    for folder in _folders(run.root, _DEPTH):
        # a link could lead anywhere, and to what has no end
        with suppress(FileNotFoundError):
            places[run.shown(folder)] = folder, run.inside(folder / CONFIG)
    for name, (folder, file) in places.items():
        # one that is damaged is not offered
        with suppress(OSError, ValueError, RecursionError):
            if file.stat().st_size > MAX_JSON:
                continue
            config = SAEConfig.from_json(file.read_bytes())
            found[name] = {"name": name, "site": config.site, "model": config.model, "n_features": config.n_features,
                           "folder": str(folder)}  # fmt: skip
    return found


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        listed = list(entries)
        if any(entry.name == WEIGHTS and entry.is_file(follow_symlinks=False) for entry in listed):
            yield folder
        for entry in sorted(listed, key=lambda each: each.name):
            # numbered folders hold episodes
            inside = depth and entry.is_dir(follow_symlinks=False) and not re.fullmatch(r"\.?\d+|\..*", entry.name)
            if inside:
                yield from _folders(Path(entry.path), depth - 1)


def _local_models(run: Run) -> list[str]:
    names = [run.rollouts[key].manifest["model"].get("name") for key in sound_keys(run)]
    return sorted({name for name in names if isinstance(name, str) and _is_folder(name)})


def _is_folder(name: str) -> bool:
    # a manifest may name what no file can be called
    with suppress(OSError):
        return Path(name).is_dir()
    return False


def _known_model(run: Run, model: str) -> None:
    known = [*shipped_policies(), *_local_models(run)]
    if model not in known:
        raise ValueError(f"no model {model!r} here; there is {known}")


def _edit(edit: Any) -> dict[str, Any]:
    kind = edit.get("edit") if isinstance(edit, Mapping) else None
    if kind not in _EDITS:
        raise ValueError(f"an edit is one of {list(_EDITS)}, got {kind!r}")
    _only(edit, ("edit", *_EDITS[kind]), f"a {kind}")
    found: dict[str, Any] = {"edit": kind, "tokens": _text(edit, "tokens", 100) if edit.get("tokens") else ""}
    for name in _EDITS[kind]:
        if name in ("site", "task", "sae"):
            found[name] = _text(edit, name, 500)
        elif name == "feature":
            found[name] = _whole(edit, name, 0, 2**31 - 1)
        elif name in ("scale", "shift"):
            found[name] = _number(edit, name, -1000.0, 1000.0)
    return found


def _only(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object")
    if unknown := sorted(set(value) - set(keys)):
        raise ValueError(f"{what} knows no {unknown}; it has {list(keys)}")


def _text(body: Mapping[str, Any], name: str, longest: int) -> str:
    value = body.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{name}: a text of at most {longest} letters, got {str(value)[:60]!r}")
    return value


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: a whole number in {low}..{high}, got {str(value)[:60]}")
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}: a number in {low:g}..{high:g}, got {str(value)[:60]}")
    return float(value)


ROUTES = [
    Route("live/options", get_options),
    Route("live/sites", get_sites, query=("model",)),
    Route("live/events", get_events),
    Route("live/start", post_start, method="POST"),
    Route("live/stop", post_stop, method="POST"),
]
