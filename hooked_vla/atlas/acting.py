"""What a worker does for the live view: an episode as it runs, and beside it the same episode edited.

Both are rows of one batch, from the same start and the same noise, so that what differs between them is the edit. A
patch comes from a third row, in which the unedited policy acts in the other task at the same time.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from hooked_vla.atlas.policies import data_url, load_policy
from hooked_vla.atlas.worker import Cancelled, Emit, WorkError
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.names import leaf
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import PAD
from hooked_vla.interventions import Ablate, Edit, EditArm, SAEFeatureEdit
from hooked_vla.rollouts.acting import ModelActor, prepare, try_out
from hooked_vla.rollouts.arms import Arm, Baseline
from hooked_vla.rollouts.batteries.arms import ImageArm
from hooked_vla.rollouts.batteries.images import IMAGE_KINDS
from hooked_vla.rollouts.cells import Cell, Group
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Environments, GroupRunner, Watcher
from hooked_vla.rollouts.settings import Options, settle, torch_threads
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.vla import HookedVLA
from hooked_vla.weights import shipped_policies

UNEDITED, EDITED, DONOR = "unedited", "edited", "donor"
# that come with the package, as the shipped policies do
SUITES = ("goal", "object", "spatial", "shift", "style")
# what an edit is offered at: what blocks hand on and what they add
LEAVES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_z")


def options(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """What there is to choose from. arguments: model: "" for models, suites and pictures' changes; a name for the
    sites of that model, with their token segments."""
    if not arguments["model"]:
        suites = {name: {task.id: task.instruction for task in get_suite(name).tasks} for name in SUITES}
        return {"models": shipped_policies(), "suites": suites,
                "images": [{"kind": kind.name, "group": kind.group, "text": kind.description, "graded": kind.graded}
                           for kind in IMAGE_KINDS.values()]}  # fmt: skip
    model = load_policy(arguments["model"])
    suite = get_suite(SUITES[0])
    settings = settle(Options(1), arguments["model"], model, suite)
    with torch_threads(settings.threads):
        env = suite.make(suite.tasks[0].id, tuple(settings.cameras.values()), settings.image_size)
        try:
            segments = model.segments(prepare(model, settings, [env.reset(seed=0)[0]]))
        finally:
            env.close()
    sites = []
    for name, site in model.hook_points.items():
        point = model.points[name]
        if leaf(name) in LEAVES and "seq" in point.streams and point.streams["seq"] in segments:
            present = [each for each in segments[point.streams["seq"]].present() if each != PAD]
            sites.append({"site": name, "pathway": site.pathway, "reaches_action": site.reaches_action,
                          "tokens": present})  # fmt: skip
    return {"sites": sites, "cameras": list(dict.fromkeys(settings.cameras.values())), "max_steps": suite.max_steps}


def act(arguments: Mapping[str, Any], emit: Emit, cancelled: Cancelled) -> dict[str, Any]:
    """Runs the twins, and the donor where an edit needs one, emitting every step of every row.

    arguments: model, suite, task, seed, max_steps; prompt (None: the task's instruction); image: {"kind", "strength"}
    or None; edits: each {"edit": "patch" | "ablate" | "steer", ...}; saes: folder or name of each autoencoder by the
    name that edits have for it.
    Raises WorkError, saying why, for what does not fit the model.
    """
    name, suite = arguments["model"], get_suite(arguments["suite"])
    model = load_policy(name)
    task, seed = suite.task(arguments["task"]).id, int(arguments["seed"])
    edited, donor = _edited(arguments, model, suite)
    arms: list[Arm] = [Baseline(UNEDITED), edited, *([Baseline(DONOR)] if donor else [])]
    cells = [Cell(0, UNEDITED, task, seed), Cell(1, EDITED, task, seed)] + (
        [Cell(2, DONOR, donor, seed)] if donor else []
    )
    settings = settle(Options(len(cells), arguments["max_steps"]), name, model, suite)
    environments = Environments(suite, tuple(settings.cameras.values()), settings.image_size, len(cells))
    watcher = _Streamer(emit, cancelled, edited, suite.fps)
    try:
        with torch_threads(settings.threads), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            env = environments.take(task)
            noise = try_out(name, model, suite, settings, env.reset(seed=seed)[0])
            environments.give_back(task, env)
            edited.fits(model)
            begun = {
                "rows": [{"row": cell.arm, "task": cell.task} for cell in cells],
                "fps": suite.fps,
                "max_steps": settings.max_steps,
                "cameras": list(dict.fromkeys(settings.cameras.values())),
                "instruction": suite.task(task).instruction,
                "notes": [str(each.message) for each in caught],
            }
            emit({"begun": begun})
            actor = ModelActor(name, model, suite, arms, settings, noise)
            runner = GroupRunner(actor, suite, name, len(cells), settings.max_steps, environments, [watcher])
            for _ in runner.run(Group(0, tuple(cells))):
                pass
    except (KeyError, RuntimeError, IndexError) as error:
        # what an edit that does not fit says at its first value
        raise WorkError(str(error.args[0]) if error.args else str(error)) from error
    finally:
        environments.close()
    return {"outcomes": watcher.outcomes}


@dataclass(frozen=True)
class LiveArm:
    """Everything that the reader changed, as one arm: a prompt, pictures, edits, and patches from the donor's row."""

    name: str
    prompt: str | None
    image: ImageArm | None
    edits: tuple[Edit, ...]
    patches: tuple["DonorPatch", ...]

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "live"}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        own = list(EditArm(self.name, self.edits).hooks(rows)) if self.edits else []
        at = [cell.arm for cell in rows]
        if not self.patches:
            return own
        to, source = at.index(self.name), at.index(DONOR)
        return own + [(patch.site, patch.between(to, source, len(at))) for patch in self.patches]

    def observe(self, cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]:
        shown = frame if self.image is None else self.image.observe(cell, env_step, frame)
        return shown if self.prompt is None else {**shown, "instruction": self.prompt}

    def fits(self, model: HookedVLA) -> None:
        """Raises ValueError where edits do not fit the model; warns of dead ends."""
        if self.edits:
            EditArm(self.name, self.edits).check(model)
        for patch in self.patches:
            if patch.site not in model.hook_points:
                raise ValueError(f"this model has no {patch.site}")
            if not model.hook_points[patch.site].reaches_action:
                warnings.warn(f"no action depends on {patch.site}: it is a dead end", UserWarning, stacklevel=2)


@dataclass(frozen=True)
class DonorPatch:
    """The edited row gets what the donor's row holds at a site. tokens: a segment; None: all tokens."""

    site: str
    tokens: str | None

    def between(self, to: int, source: int, n_rows: int) -> Any:
        """The hook function; to, source: rows of a batch of n_rows."""

        def patch(value: Tensor, hook: HookPoint) -> Tensor:
            # a batch row may be several images
            n = value.shape[0] // n_rows
            mine, theirs = (value[row * n : (row + 1) * n] for row in (to, source))
            if self.tokens is None:
                mine.copy_(theirs.clone())
                return value
            segments = hook.segments
            assert segments is not None
            mask = segments.mask(self.tokens)
            here, there = (mask[row * n : (row + 1) * n] for row in (to, source))
            if int(here.sum()) != int(there.sum()):
                raise WorkError(
                    f"{self.site}: the two tasks have {int(there.sum())} and {int(here.sum())} tokens of "
                    f"{self.tokens!r}, which cannot stand for each other: choose other tokens"
                )
            mine[here] = theirs[there].clone()
            return value

        return patch


def _edited(arguments: Mapping[str, Any], model: HookedVLA, suite: Suite) -> tuple[LiveArm, str | None]:
    """The arm, and the donor's task where there is one. Raises WorkError."""
    image = arguments["image"]
    edits: list[Edit] = []
    patches: list[DonorPatch] = []
    donors: list[str] = []
    try:
        for edit in arguments["edits"]:
            tokens = edit["tokens"] or None
            if edit["edit"] == "patch":
                donors.append(suite.task(edit["task"]).id)
                patches.append(DonorPatch(edit["site"], tokens))
            elif edit["edit"] == "ablate":
                edits.append(Ablate(edit["site"], "zero", tokens=tokens))
            else:
                sae = SparseAutoencoder.from_pretrained(arguments["saes"][edit["sae"]])
                spliced = sae.splice()
                edits.append(SAEFeatureEdit(sae.config.site, spliced, [edit["feature"]], scale=edit["scale"],
                                            shift=edit["shift"], tokens=tokens))  # fmt: skip
        changed = ImageArm("image", image["kind"], image["strength"], None, "run") if image else None
        arm = LiveArm(EDITED, arguments["prompt"], changed, tuple(edits), tuple(patches))
    except (ValueError, OSError) as error:
        raise WorkError(str(error)) from error
    if len(set(donors)) > 1:
        raise WorkError(f"one other task at a time can be patched from, got {sorted(set(donors))}")
    return arm, donors[0] if donors else None


@dataclass
class _Streamer(Watcher):
    """Emits every step, no faster than the simulator's clock, and ends the run when it is cancelled."""

    emit: Emit
    cancelled: Cancelled
    edited: LiveArm
    fps: int
    draws_every_step = True
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    began: float | None = None

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if self.cancelled():
            raise WorkError("stopped")
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        if (early := self.began + env_step / self.fps - now) > 0:
            time.sleep(early)
        seen = self.edited.observe(cell, env_step, before) if cell.arm == EDITED else before
        phase = info.get("phase")
        self.emit({"row": cell.arm, "step": env_step, "frames": _frames(seen), "state": _numbers(before["state"]),
                   "action": _numbers(action), "phase": phase, "told": seen["instruction"]})  # fmt: skip

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        row = {"row": part.cell.arm, "n_steps": part.n_steps, "success": part.success}
        self.outcomes.append(row)
        self.emit({"over": row, "frames": _frames(last), "state": _numbers(last["state"])})


def _frames(seen: Mapping[str, Any]) -> dict[str, str]:
    return {camera: data_url(np.asarray(image), "jpeg") for camera, image in seen["pixels"].items()}


def _numbers(values: Any) -> list[float]:
    return [round(float(value), 4) for value in np.asarray(values).ravel()]
