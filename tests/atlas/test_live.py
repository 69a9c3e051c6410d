"""The twins differ by the edit alone; a session is one at a time, ends when it is told to, and when nobody listens."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from unchecked import unchecked_shapes

from hooked_vla.atlas import acting
from hooked_vla.atlas.routes import Conflict
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import live
from hooked_vla.atlas.worker import Worker, WorkError
from hooked_vla.sae.files import CONFIG, WEIGHTS

ASKED = {"model": "smolvla-tabletop", "suite": "goal", "task": "red-orange", "seed": 3, "max_steps": 8}
SITE = "vlm.blocks.1.hook_resid_post"


def acted(cancelled: Callable[[], bool] = lambda: False, **changed: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """States of every row and what was said of the beginning."""
    asked = {**ASKED, "prompt": None, "image": None, "edits": [], "saes": {}, **changed}
    said: list[dict[str, Any]] = []
    with unchecked_shapes():
        acting.act(asked, said.append, cancelled)
    rows: dict[str, list[Any]] = {}
    for event in said[1:]:
        rows.setdefault(event["row"] if "row" in event else event["over"]["row"], []).append(event["state"])
    return rows, said[0]["begun"]


def test_an_edit_that_changes_nothing_leaves_twins() -> None:
    same_task = {"edit": "patch", "site": SITE, "tokens": "", "task": ASKED["task"]}
    dead_end = {"edit": "ablate", "site": "vlm.blocks.3.hook_resid_post", "tokens": ""}
    rows, begun = acted(edits=[same_task, dead_end])
    assert list(rows) == ["unedited", "edited", "donor"]
    assert rows["unedited"] == rows["edited"] == rows["donor"]
    assert len(rows["unedited"]) == ASKED["max_steps"] + 1
    assert any("dead end" in note or "no action depends" in note for note in begun["notes"])


def test_edits_change_the_edited_twin_alone() -> None:
    plain, _ = acted()
    other = {"edit": "patch", "site": SITE, "tokens": "", "task": "green-cyan"}
    patched, _ = acted(edits=[other])
    prompted, _ = acted(prompt="put the green block on the cyan pad")
    blinded, _ = acted(image={"kind": "blank", "strength": 1.0})
    for rows in (patched, prompted, blinded):
        assert rows["unedited"] == plain["unedited"] == plain["edited"]
        assert rows["edited"] != rows["unedited"]
    # what stands in every token after block 1 is all that the policy knows of the task
    assert prompted["edited"] != patched["edited"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "no-such"}, "unknown task 'no-such'"),
        ({"model": "someone/else"}, "not on this machine"),
        ({"edits": [{"edit": "ablate", "site": "vlm.blocks.9.hook_resid_post", "tokens": ""}]}, "no hook point"),
        ({"edits": [{"edit": "patch", "site": "nowhere", "tokens": "", "task": "red-cyan"}]}, "no nowhere"),
        ({"edits": [{"edit": "patch", "site": SITE, "tokens": "", "task": each} for each in ("red-cyan", "blue-cyan")]},
         "one other task"),
        ({"image": {"kind": "blank", "strength": 0.5}}, "no degrees"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        acted(**changed)


def test_a_run_that_is_stopped_ends_at_the_next_step() -> None:
    asked = iter([False, False, False, True])
    with pytest.raises(WorkError, match="stopped"):
        acted(cancelled=lambda: next(asked))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"more": 1}, "knows no"),
        ({"seed": -1}, "seed: a whole number"),
        ({"seed": True}, "seed: a whole number"),
        ({"max_steps": 10**6}, "max_steps"),
        ({"prompt": "x" * 301}, "prompt: a text of at most 300"),
        ({"task": None}, "task: a text"),
        ({"image": {"kind": "blur", "strength": float("nan")}}, "strength: a number"),
        ({"edits": [{"edit": "run", "code": "1"}]}, "an edit is one of"),
        ({"edits": [{"edit": "ablate", "site": "a", "heads": 1}]}, "knows no"),
        ({"edits": [{"edit": "ablate", "site": "a"}] * 5}, "at most 4"),
        ({"edits": [{"edit": "steer", "sae": "s", "feature": 1.5, "scale": 1, "shift": 0}]}, "feature: a whole number"),
    ],
)
def test_what_a_page_asks_is_checked(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        live.check_asked({**ASKED, "prompt": None, "image": None, "edits": [], **changed})


def test_only_models_and_autoencoders_of_this_machine_act(tmp_path: Path) -> None:
    run = Run.open(tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="no model '/etc'"):
        live.post_start(run, {**ASKED, "model": "/etc"})
    steer = {"edit": "steer", "sae": "../../sae", "feature": 0, "tokens": "", "scale": 1, "shift": 0}
    with pytest.raises(ValueError, match="no autoencoder"):
        live.post_start(run, {**ASKED, "edits": [steer]})


class Ticking(Worker):
    """Says a number every few milliseconds until it is cancelled or has said n."""

    def __init__(self, n: int) -> None:
        super().__init__("test")
        self.n = n
        self.cancelled = threading.Event()

    def stream(
        self, task: str, arguments: Mapping[str, Any], seconds: float, cancelled: Callable[[], bool]
    ) -> Iterator[tuple[str, Any]]:
        for i in range(self.n):
            if cancelled():
                self.cancelled.set()
                raise WorkError("stopped")
            time.sleep(0.005)
            yield "event", {"i": i}
        yield "done", {"outcomes": []}


def test_every_listener_hears_all_of_a_session() -> None:
    session = live.Session(Ticking(20), {})
    early = live.Listener(session)
    heard = [event for event in early if event is not None]
    assert [event.get("i") for event in heard] == [*range(20), None]
    assert heard[-1] == {"ended": "done", "outcomes": []}
    # a page that loads again
    assert [event for event in live.Listener(session) if event is not None] == heard


def test_a_session_ends_when_its_last_listener_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "ALONE_S", 0.1)
    worker = Ticking(2000)
    session = live.Session(worker, {})
    first, second = live.Listener(session), live.Listener(session)
    first.close()
    first.close()
    time.sleep(0.3)
    assert not session.over
    second.close()
    assert worker.cancelled.wait(3)
    session.join(3.0)
    assert session.events[-1] == {"ended": "stopped"}


def test_one_session_at_a_time() -> None:
    place = live.Live()
    place.worker = Ticking(2000)
    place.start({})
    assert place.session is not None
    with pytest.raises(Conflict, match="runs already"):
        place.start({})
    place.session.stop()
    place.session.join(3.0)
    place.start({})
    place.close()
    assert place.session.over


def test_autoencoders_are_found_in_the_run_and_only_there(tmp_path: Path) -> None:
    from hooked_vla.sae.autoencoder import SparseAutoencoder
    from hooked_vla.sae.config import SAEConfig

    config = SAEConfig(model="smolvla-tabletop", site=SITE, d_model=8, n_features=16, architecture="relu",
                       normalisation="none", training=None)  # fmt: skip
    SparseAutoencoder(config).save_pretrained(tmp_path / "run" / "trained")
    (tmp_path / "run" / "broken").mkdir()
    (tmp_path / "run" / "broken" / "sae.safetensors").write_bytes(b"x")
    found = live.find_saes(Run.open(tmp_path / "run", cache=tmp_path / "cache"))
    own = {name: each for name, each in found.items() if each["folder"].startswith(str(tmp_path))}
    assert list(own) == ["trained"]
    assert own["trained"]["site"] == SITE


def test_a_config_that_leads_elsewhere_or_has_no_end_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    for name in ("endless", "outside", "nested", "large"):
        (root / name).mkdir(parents=True)
        (root / name / WEIGHTS).write_bytes(b"x")
    (root / "endless" / CONFIG).symlink_to("/dev/zero")
    (tmp_path / "elsewhere.json").write_text("{}")
    (root / "outside" / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    (root / "nested" / CONFIG).write_text("[" * 100_000)
    with (root / "large" / CONFIG).open("wb") as file:
        file.truncate(live.MAX_JSON + 1)
    read: list[Path] = []
    real = Path.read_bytes

    def noted(path: Path) -> bytes:
        # what has no end would take the machine with it
        assert path.resolve() != Path("/dev/zero")
        read.append(path.resolve())
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    found = live.find_saes(Run.open(root, cache=tmp_path / "cache"))
    assert not [each for each in found.values() if each["folder"].startswith(str(tmp_path))]
    assert [path for path in read if path.is_relative_to(tmp_path)] == [root / "nested" / CONFIG]


@pytest.mark.parametrize("model", [None, [], "x", {"name": ["a"]}, {"name": "x" * 5000}, {"name": "a\0"}])
def test_damaged_rollouts_leave_the_live_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: object) -> None:
    (tmp_path / "run").mkdir()
    about = {"format": "hooked-vla rollouts 1", "model": model, "suite": {"name": "s", "tasks": {}}, "arms": {"a": {}},
             "settings": {}, "scenes": [["t", 0]]}  # fmt: skip
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(about))
    run = Run.open(tmp_path, cache=tmp_path / "cache")
    monkeypatch.setattr(Worker, "run", lambda *_: {"models": ["smolvla-tabletop"]})
    assert live.get_options(run)["models"] == ["smolvla-tabletop"]
    live.get_sites(run, "smolvla-tabletop")
    run.close()
