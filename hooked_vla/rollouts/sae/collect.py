"""Activations for autoencoders: straight from a policy that acts (or is shown a data set), or into a store.

>>> source = RolloutSource(model, "goal", "vlm.blocks.*.hook_resid_post", seed=0)         # nothing is kept
>>> source = DatasetSource(model, "data/goal", "vlm.blocks.*.hook_resid_post", seed=0)
>>> store = collect(model, "goal", "vlm.blocks.*.hook_resid_post", episodes=40, seed=0, out="activations")
>>> source = StoreSource(store, seed=0)                                                   # hooked_vla.sae.store_source
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.cells import Cell, Scene, spread_scenes
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.sae.lerobot_suite import episode_scenes, lerobot_suite
from hooked_vla.rollouts.sae.streams import PolicyStream, episodes_of
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.sweep import DEFAULTS, make_plan, run_plans
from hooked_vla.sae.buffer import CAPACITY, N_BLOCKS, RingBuffer
from hooked_vla.sae.rows import NONE, Capture, Names, RowTaker
from hooked_vla.sae.source import check_same
from hooked_vla.sae.store import SHARD_ROWS, TokenStore
from hooked_vla.sae.store_writer import StoreWriter
from hooked_vla.vla import HookedVLA

# where a store keeps the tables of the episodes that its rows are from
ROLLOUTS = "rollouts"


class _PolicySource:
    """What the sources below have in common; a `Source`, see hooked_vla/sae/source.py.

    ring: the buffer that mixes rows, whose `n_bytes` is what it takes; n_episodes, n_successes: that ran so far.
    """

    def __init__(
        self,
        model: HookedVLA,
        suite: Suite,
        first: Scene,
        sites: NamesFilter | Capture,
        seed: int,
        buffer_rows: int,
        previous: bool,
        options: Options,
        device: str | torch.device,
    ) -> None:
        self.capture = capture = sites if isinstance(sites, Capture) else Capture(sites)
        self.plan = make_plan(model, suite, [first], options=options)
        self.n_envs, self.seed = self.plan.job.settings.n_envs, seed
        self.stream = PolicyStream(self.plan.job, model, capture, self.cells, previous, device)
        self.n_episodes = self.n_successes = 0
        self.stream.on_part = self._count
        self.ring = RingBuffer(
            self.stream, self.stream.widths(), self.stream.groups, seed, buffer_rows, N_BLOCKS,
            capture.dtype or torch.float32, device,
        )  # fmt: skip

    def cells(self, unit: int) -> list[Cell] | None:
        """The episodes of a group; None where there are no more."""
        raise NotImplementedError

    @property
    def widths(self) -> Mapping[str, int]:
        return self.ring.widths

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        return self.ring.groups

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """See `Source.sample`; of the first block of the buffer."""
        return self.ring.sample(n)

    def batches(self, batch_size: int) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
        """See `Source.batches`. Raises what running the policy raises."""
        return self.ring.batches(batch_size)

    @property
    def about(self) -> dict[str, Any]:
        """Plain values that say which rows come: weights, suite, settings of the rollouts, seed."""
        settings = {name: value for name, value in self.plan.manifest["settings"].items() if name != "threads"}
        return {
            "weights": self.plan.job.weights, "suite": self.plan.job.suite.name, "settings": settings,
            "seed": self.seed, "capture": self.capture.to_json(),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return self.about | {"ring": self.ring.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Source.load_state_dict`; the episodes that the buffer holds are run again."""
        check_same(type(self).__name__, state, self.about)
        self.ring.load_state_dict(state["ring"])

    def close(self) -> None:
        """Close the environments, take the hooks off the model and let go of the buffer; a later batch begins anew
        from the same state."""
        self.ring.close()

    def _count(self, part: Part) -> None:
        self.n_episodes, self.n_successes = self.n_episodes + 1, self.n_successes + part.success


class RolloutSource(_PolicySource):
    """Activations of a policy as it acts, on and on: episode i is of task i (in turn) and has seed `seed + i`.

    The policy's own preprocessing and noise are those of any rollout. sites: as `model.add_hook` takes them, or a
    `Capture` that also says how they are pooled and which tokens count. tasks: of the suite, all where None. options:
    as for `run_rollouts`. buffer_rows: rows of each site that are mixed (`ring.n_bytes` is what that takes). previous:
    each site also comes as it was one planning step before, see source.py. device: of the buffer.
    Between two batches the model is the caller's.
    """

    def __init__(
        self,
        model: HookedVLA,
        suite: Suite | str,
        sites: NamesFilter | Capture,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
        buffer_rows: int = CAPACITY,
        previous: bool = False,
        options: Options = DEFAULTS,
        device: str | torch.device = "cpu",
    ) -> None:
        """Raises KeyError for a site that the model does not have; ValueError for one without vectors, a negative seed,
        an unknown task, a model that cannot act in the suite, and a buffer that cannot be cut into blocks."""
        found = get_suite(suite) if isinstance(suite, str) else suite
        self.tasks = [task.id for task in found.tasks] if tasks is None else list(tasks)
        first = spread_scenes(self.tasks, 1, seed)[0]
        for task in self.tasks:
            found.task(task)
        super().__init__(model, found, first, sites, seed, buffer_rows, previous, options, device)

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"tasks": self.tasks}

    def cells(self, unit: int) -> list[Cell] | None:
        """The episodes of a group."""
        numbers = range(unit * self.n_envs, (unit + 1) * self.n_envs)
        return [Cell(i, BASELINE.name, self.tasks[i % len(self.tasks)], self.seed + i) for i in numbers]


class DatasetSource(_PolicySource):
    """Activations of a policy that is shown a LeRobotDataset: at frame 0 of an episode and whenever it would plan.

    folder: of the data set. episodes: their numbers, all where None. passes: through them, each in another order, None
    for endless. options: n_action_steps is how many frames come from one plan to the next (at most a chunk); cameras
    says which of the data set's stands for which of the model's. All else as for `RolloutSource`.
    """

    def __init__(
        self,
        model: HookedVLA,
        folder: str | Path,
        sites: NamesFilter | Capture,
        seed: int = 0,
        episodes: Collection[int] | None = None,
        passes: int | None = None,
        buffer_rows: int = CAPACITY,
        previous: bool = False,
        options: Options = DEFAULTS,
        device: str | torch.device = "cpu",
    ) -> None:
        """Raises as `RolloutSource` and `lerobot_suite`; ValueError for an episode that is not there, or none."""
        suite = lerobot_suite(folder)
        scenes = {scene.seed: scene for scene in episode_scenes(suite)}
        wanted = list(scenes) if episodes is None else sorted(set(episodes))
        missing = [number for number in wanted if number not in scenes]
        if missing or not wanted:
            raise ValueError(f"{folder} has episodes {min(scenes)}..{max(scenes)}, asked for {missing[:5] or 'none'}")
        if passes is not None and passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.scenes, self.passes = [scenes[number] for number in wanted], passes
        super().__init__(model, suite, self.scenes[0], sites, seed, buffer_rows, previous, options, device)

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"episodes": [scene.seed for scene in self.scenes], "passes": self.passes}

    def cells(self, unit: int) -> list[Cell] | None:
        """The episodes of a group; their ids are those of the data set."""
        number, group = divmod(unit, -(-len(self.scenes) // self.n_envs))
        if self.passes is not None and number >= self.passes:
            return None
        order = np.random.default_rng((self.seed, number)).permutation(len(self.scenes))
        chosen = [self.scenes[i] for i in order[group * self.n_envs : (group + 1) * self.n_envs]]
        return [Cell(scene.seed, BASELINE.name, scene.task, scene.seed) for scene in chosen]


class StoreWatcher(Watcher):
    """Writes what a taker takes into a store while episodes run; a group counts when all of its episodes are over.

    Episodes that are in the store are left as they are, so that an interrupted run goes on.
    """

    def __init__(self, writer: StoreWriter, taker: RowTaker) -> None:
        self.writer, self.taker = writer, taker
        self._open: set[int] = set()
        self._group: set[int] = set()

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """None where the group is in the store already."""
        episodes = episodes_of(rows)
        self._group = set(episodes) - {NONE}
        self._open = set(self._group)
        if self._group <= self.writer.episodes:
            self._open = set()
            self.taker.rest()
            return ()
        # what a group that was interrupted left
        self.taker.take()
        self.taker.watch(episodes)
        return self.taker.requests()

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write what the last plan brought."""
        if rows := self.taker.take():
            self.writer.add(rows, self.taker.groups)

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        """With its group's last episode, all of it counts, before the episode counts as run."""
        if part.cell.id in self._open:
            self._open.remove(part.cell.id)
            if not self._open:
                self.writer.commit(self._group)


def collect(
    model: HookedVLA | ModelSource | str,
    suite: Suite | str,
    sites: NamesFilter | Capture,
    episodes: int,
    seed: int,
    out: str | Path,
    tasks: Sequence[str] | None = None,
    options: Options = DEFAULTS,
    name: str | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> TokenStore:
    """Run episodes and keep the activations of some sites, with ids, in a store; tables of the episodes lie in
    out/rollouts, numbered as in the ids.

    model, suite, episodes, seed, tasks, options, name: as for `run_rollouts`. sites: as for `RolloutSource`. The same
    call gives the same bytes, also when it was killed and called again; one that is complete is only opened. Rows are
    written as they come: nothing but one forward pass of them is in memory.
    Raises KeyError for a site that the model does not have; ValueError for one without vectors, a folder with other
    files or another store, and what `run_rollouts` raises it for; BlockingIOError where another process writes there;
    OSError on a full disk, where whole groups of episodes are left.
    """
    found = get_suite(suite) if isinstance(suite, str) else suite
    scenes = spread_scenes([task.id for task in found.tasks] if tasks is None else tasks, episodes, seed)
    return _collect(model, found, sites, scenes, out, options, name, shard_rows, progress)


def collect_dataset(
    model: HookedVLA | ModelSource | str,
    folder: str | Path,
    sites: NamesFilter | Capture,
    out: str | Path,
    episodes: int | None = None,
    options: Options = DEFAULTS,
    name: str | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> TokenStore:
    """Show a policy the first episodes of a LeRobotDataset (all where None), and keep activations as `collect` does.

    Raises as `collect` and `lerobot_suite`.
    """
    suite = lerobot_suite(folder)
    return _collect(model, suite, sites, episode_scenes(suite, episodes), out, options, name, shard_rows, progress)


def _collect(
    model: HookedVLA | ModelSource | str,
    suite: Suite,
    sites: NamesFilter | Capture,
    scenes: Sequence[Scene],
    out: str | Path,
    options: Options,
    name: str | None,
    shard_rows: int,
    progress: bool,
) -> TokenStore:
    out, capture = Path(out), sites if isinstance(sites, Capture) else Capture(sites)
    source = ModelSource(model) if isinstance(model, str) else model
    loaded = source.load() if isinstance(source, ModelSource) else source
    if name is None:
        name = source.name if isinstance(source, ModelSource) else loaded.spec.name
    plan = make_plan(loaded, suite, scenes, options=options, name=name)
    taker = RowTaker(loaded, capture, Names())
    about = {
        "model": plan.manifest["model"]["name"], "weights": plan.manifest["model"]["weights"], "suite": suite.name,
        "settings": plan.manifest["settings"], "scenes": plan.manifest["scenes"], "sites": taker.sites,
        **capture.to_json(),
    }  # fmt: skip
    with StoreWriter(out, about, shard_rows) as writer:
        taker.names = writer.names
        watcher = StoreWatcher(writer, taker)
        run_plans([plan], [out / ROLLOUTS], None, progress, [watcher], {0: loaded})
        wanted = {cell.id for group in plan.groups for cell in group.cells}
        if missing := sorted(wanted - writer.episodes):
            raise ValueError(
                f"{out / ROLLOUTS} has episodes {missing[:5]}, whose activations are not in {out}: remove both and run "
                "this again"
            )
        writer.finish()
    return TokenStore(out)
