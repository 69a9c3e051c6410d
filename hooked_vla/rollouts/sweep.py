"""Rollouts: a model acts in a suite's tasks, under one arm or several, and what happened is recorded.

`run_rollouts` is the whole of it for one model and one suite; `make_plan` and `run_plans` are its two halves, so that
many models and suites can share the workers of one executor.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hooked_vla.interventions import EditArm
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.acting import EXPERT, ExpertActor, try_out
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Group, Scene, cut_groups, spread_scenes
from hooked_vla.rollouts.executor import Executor, LocalExecutor, run_tasks
from hooked_vla.rollouts.jobs import Job, ModelSource, Task
from hooked_vla.rollouts.manifest import claim_folder, describe_model, make_manifest
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.records import Part, Store, read_episodes
from hooked_vla.rollouts.runner import Timing, Watcher
from hooked_vla.rollouts.settings import Options, Settings, check_action_width, settle, torch_threads
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.summary import ArmSummary, summarise
from hooked_vla.vla import HookedVLA

with needs_sim_extra():
    import pyarrow as pa

logger = logging.getLogger(__name__)

Model = HookedVLA | ModelSource | str
DEFAULTS = Options()


@dataclass(frozen=True)
class Plan:
    """A sweep over one model and one suite, ready to run: its cells in groups, and what its results say of it."""

    job: Job
    groups: tuple[Group, ...]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Rollouts:
    """What a sweep came to. episodes: the table of all of them (see records.EPISODES), those of earlier runs of the
    same sweep included; summary: success by arm; timing: of this run's work, over all plans that ran together;
    folder: None where nothing was kept."""

    plan: Plan
    episodes: pa.Table
    summary: Mapping[str, ArmSummary]
    timing: Timing
    folder: Path | None


def run_rollouts(
    model: Model,
    suite: Suite | str,
    episodes: int,
    seed: int,
    tasks: Sequence[str] | None = None,
    arms: Sequence[Arm] = (BASELINE,),
    out: str | Path | None = None,
    options: Options = DEFAULTS,
    name: str | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    watchers: Sequence[Watcher] = (),
) -> Rollouts:
    """Episodes of a model in a suite, under every arm.

    model: a loaded model; where to get one; what `HookedVLA.from_pretrained` takes; or "expert", for the suite's
    scripted one. episodes: of each arm, spread evenly over the tasks (all of the suite's where None) in their order;
    episode i has seed `seed + i`, from which its start and the policy's noise follow, the same under all arms.
    out: folder of the results; None: they are only returned. The same call gives the same bytes, also when it was
    killed and called again. name: what results call the model. See `run_plans` for the rest.
    Raises as `spread_scenes`, `make_plan` and `run_plans`.
    """
    suite = get_suite(suite) if isinstance(suite, str) else suite
    scenes = spread_scenes([task.id for task in suite.tasks] if tasks is None else tasks, episodes, seed)
    plan, loaded = _plan(model, suite, scenes, arms, options, name)
    ready = {} if loaded is None else {0: loaded}
    return run_plans([plan], [out], executor, progress, watchers, ready)[0]


def make_plan(
    model: Model,
    suite: Suite | str,
    scenes: Sequence[Scene],
    arms: Sequence[Arm] = (BASELINE,),
    options: Options = DEFAULTS,
    name: str | None = None,
) -> Plan:
    """A sweep of every scene under every arm, checked against model and suite; nothing is written.

    Arguments as for `run_rollouts`. The model is loaded to be looked at, and let go again.
    Raises ValueError for no scenes, an unknown suite or task, arms that cannot be told apart, a model whose cameras,
    state or action width are not the suite's, a task that has no expert where that is to act, and numbers below 1; and
    what loading the model and making an environment raise.
    """
    return _plan(model, get_suite(suite) if isinstance(suite, str) else suite, scenes, arms, options, name)[0]


def run_plans(
    plans: Sequence[Plan],
    folders: Sequence[str | Path | None],
    executor: Executor | None = None,
    progress: bool = False,
    watchers: Sequence[Watcher] = (),
    loaded: Mapping[int, HookedVLA] | None = None,
) -> list[Rollouts]:
    """Runs what is not recorded yet of every plan, on one executor (this process where None).

    folders: where each plan's results go, each a folder of its own; None: nowhere, they are only returned. Where the
    same plan was begun in a folder, it is gone on with: a group that is not wholly recorded runs again as a whole,
    and gives the same bytes. progress: show a bar on standard error. watchers look on, in this process only; they see
    again what runs again. loaded: models that are here already, by the plan's number.
    Raises ValueError for a folder with other results, or watchers with an executor of other processes; WorkerError
    when a worker fails; BlockingIOError where another process records in a folder; OSError on a full disk, where
    whole episodes are left.
    """
    executor = LocalExecutor() if executor is None else executor
    if watchers and not executor.in_process:
        raise ValueError("watchers look on in this process: use LocalExecutor(workers=1)")
    if len(plans) != len(folders):
        raise ValueError(f"{len(plans)} plans, but {len(folders)} folders")
    kept = [None if folder is None else Path(folder) for folder in folders]
    with ExitStack() as stack:
        stores = [_open_store(stack, plan, folder) for plan, folder in zip(plans, kept, strict=True)]
        tasks = [
            Task(number, group)
            for number, (plan, store) in enumerate(zip(plans, stores, strict=True))
            for group in plan.groups
            if not store.recorded.issuperset(cell.id for cell in group.cells)
        ]
        bar = stack.enter_context(_Progress(plans, stores, progress))

        def record(task: Task, part: Part) -> None:
            if stores[task.job].add(part):
                bar.add(part)

        timing = Timing()
        if tasks:
            pool = executor.pool([plan.job for plan in plans], loaded or {}, watchers)
            timing = run_tasks(tasks, pool, executor.workers, record)
        tables = [read_episodes(store.folder) for store in stores]
    return [
        Rollouts(plan, table, summarise(table), timing, folder)
        for plan, table, folder in zip(plans, tables, kept, strict=True)
    ]


def _plan(
    model: Model, suite: Suite, scenes: Sequence[Scene], arms: Sequence[Arm], options: Options, name: str | None
) -> tuple[Plan, HookedVLA | None]:
    """The plan, and the model where one acts."""
    if not scenes:
        raise ValueError("no scenes to run")
    for task, n in Counter(scene.task for scene in scenes).items():
        suite.task(task)
        if suite.n_starts is not None and n > suite.n_starts:
            logger.warning("%d episodes of %r, but the suite %r has %d starts", n, task, suite.name, suite.n_starts)
    source = None if model == EXPERT else ModelSource(model) if isinstance(model, str) else model
    name = name or _name(source)
    if source is None:
        loaded = None
        make_expert = ExpertActor(suite).make
        for task in dict.fromkeys(scene.task for scene in scenes):
            make_expert(task)
        # what the simulator lacks is found before anything is written; for a model, trying it out does that
        suite.make(scenes[0].task, (), 1).close()
    else:
        if isinstance(source, ModelSource) and (spec := source.spec()) is not None:
            # before weights are made
            check_action_width(name, spec.features.d_action, suite)
        loaded = source.load() if isinstance(source, ModelSource) else source
    for arm in arms:
        if isinstance(arm, EditArm):
            if loaded is None:
                raise ValueError(f"arm {arm.name!r}: edits need a model, and {EXPERT!r} is a script")
            arm.check(loaded)
    settings = settle(options, name, loaded, suite)
    noise = None if loaded is None else _try_out(name, loaded, suite, settings, scenes[0])
    described = describe_model(name, loaded)
    device = torch.device("cpu") if loaded is None else loaded.device
    manifest = make_manifest(described, suite, scenes, arms, settings, device)
    job = Job(name, source, suite, tuple(arms), settings, described["weights"], noise)
    return Plan(job, cut_groups(scenes, [arm.name for arm in arms], settings.n_envs), manifest), loaded


def _name(source: ModelSource | HookedVLA | None) -> str:
    if source is None:
        return EXPERT
    return source.name if isinstance(source, ModelSource) else source.spec.name


def _try_out(name: str, model: HookedVLA, suite: Suite, settings: Settings, scene: Scene) -> SeededNoise:
    """What the model draws. Raises ValueError where it cannot act in the suite."""
    env = suite.make(scene.task, tuple(settings.cameras.values()), settings.image_size)
    try:
        with torch_threads(settings.threads):
            return try_out(name, model, suite, settings, env.reset(seed=scene.seed)[0])
    finally:
        env.close()


def _open_store(stack: ExitStack, plan: Plan, folder: Path | None) -> Store:
    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hooked-vla-rollouts-")))
    claim_folder(folder, plan.manifest)
    return stack.enter_context(Store.open(folder))


class _Progress:
    """A bar over episodes, with the share of successes so far."""

    def __init__(self, plans: Sequence[Plan], stores: Sequence[Store], shown: bool) -> None:
        total = sum(len(group.cells) for plan in plans for group in plan.groups)
        done = sum(len(store.recorded) for store in stores)
        self.bar = tqdm(total=total, initial=done, unit="episode", disable=not shown)
        self.n = self.n_successes = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, part: Part) -> None:
        self.n, self.n_successes = self.n + 1, self.n_successes + part.success
        self.bar.set_postfix_str(f"success {self.n_successes / self.n:.0%}", refresh=False)
        self.bar.update()
