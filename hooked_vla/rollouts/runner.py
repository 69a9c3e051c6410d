"""Runs a group of cells: environments step in lockstep, the policy plans for all rows at once.

All rows start at environment step 0 and plan at the same steps, so one clock holds for the batch; it ends when the
last row's episode does. Running a group again gives the same episodes, bit for bit. A policy looks only at the steps
at which it plans: in between, environments whose `unwrapped.cameras` can be set draw nothing.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from hooked_vla.hooks.model import HookRequest
from hooked_vla.rollouts.acting import Actor, Row
from hooked_vla.rollouts.cells import Cell, Group
from hooked_vla.rollouts.records import EpisodeLog, Part
from hooked_vla.rollouts.suites import Suite

Env = gymnasium.Env[dict[str, Any], Any]


class Watcher:
    """Looks on while episodes run, to record more than the tables hold; every method may be overridden.

    draws_every_step: `step` needs the pixels of every observation, not only of those that the policy sees.
    """

    draws_every_step = False

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """Hooks to attach after the edits while the group runs; rows as for `Arm.hooks`."""
        return ()

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """An episode took a step. before: the observation in which the action was taken; info: what it led to."""

    def end(self, part: Part, last: Mapping[str, Any]) -> None:
        """An episode is over; last: its last observation."""


@dataclass
class Timing:
    """Wall seconds by what they went to, processor seconds of all threads, and what was done; sums over workers."""

    env_s: float = 0.0
    policy_s: float = 0.0
    total_s: float = 0.0
    cpu_s: float = 0.0
    env_steps: int = 0
    chunks: int = 0
    episodes: int = 0

    def add(self, other: "Timing") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        shares = [seconds / self.total_s for seconds in (self.env_s, self.policy_s)] if self.total_s else [0.0, 0.0]
        return (
            f"{self.episodes} episodes, {self.env_steps} steps, {self.chunks} chunks in {self.total_s:.1f} s of work "
            f"({self.cpu_s:.1f} s of processor time): environments {shares[0]:.0%}, policy {shares[1]:.0%}, "
            f"runner {1 - sum(shares):.1%}"
        )


class _Watch:
    """Adds to a timing's totals what passes between `start` and `stop`; it runs from the beginning."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.start()

    def start(self) -> None:
        self.since: tuple[float, float] | None = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        if self.since is not None:
            self.timing.total_s += time.perf_counter() - self.since[0]
            self.timing.cpu_s += time.process_time() - self.since[1]
        self.since = None


class Environments:
    """Environments of a suite that are made once and reused; idle ones beyond `limit` are closed."""

    def __init__(self, suite: Suite, cameras: Sequence[str], image_size: int, limit: int) -> None:
        self.suite, self.cameras, self.image_size, self.limit = suite, tuple(cameras), image_size, limit
        self._idle: list[tuple[str, Env]] = []

    def take(self, task: str) -> Env:
        """An environment of the task that nobody uses."""
        for i, (name, env) in enumerate(self._idle):
            if name == task:
                del self._idle[i]
                return env
        return self.suite.make(task, self.cameras, self.image_size)

    def give_back(self, task: str, env: Env) -> None:
        self._idle.append((task, env))
        while len(self._idle) > self.limit:
            self._idle.pop(0)[1].close()

    def close(self) -> None:
        """Close the idle ones."""
        while self._idle:
            self._idle.pop()[1].close()


@dataclass
class _Episode:
    """A row's episode while it runs."""

    row: Row
    log: EpisodeLog
    obs: dict[str, Any]
    info: dict[str, Any]
    cameras: tuple[str, ...] | None = field(default=None)

    @classmethod
    def start(cls, cell: Cell, env: Env, n_seen: int) -> "_Episode":
        # only what reads back as it was set is taken to be the list of what is drawn
        cameras = getattr(env.unwrapped, "cameras", None)
        obs, info = env.reset(seed=cell.seed)
        row = Row(cell, env, deque([obs] * n_seen, maxlen=n_seen))
        return cls(row, EpisodeLog(cell, obs["instruction"]), obs, info, cameras if type(cameras) is tuple else None)

    def step(self, action: np.ndarray, look: bool, draw: bool) -> tuple[float, bool, bool]:
        """One environment step. look: the policy will see the observation after it; draw: somebody will."""
        env = self.row.env
        if draw or self.cameras is None:
            self.obs, reward, terminated, truncated, self.info = env.step(action)
        else:
            env.unwrapped.cameras = ()
            try:
                self.obs, reward, terminated, truncated, self.info = env.step(action)
            finally:
                env.unwrapped.cameras = self.cameras
        if look:
            self.row.seen.append(self.obs)
        return float(reward), bool(terminated), bool(truncated)


@dataclass
class GroupRunner:
    """Runs groups of one model on one suite. n_rows: rows of a batch; model: its name, for the table of episodes."""

    actor: Actor
    suite: Suite
    model: str
    n_rows: int
    max_steps: int
    environments: Environments
    watchers: Sequence[Watcher] = ()
    timing: Timing = field(default_factory=Timing)

    def run(self, group: Group) -> Iterator[Part]:
        """The group's episodes, each as soon as it is over.

        Raises ValueError when the policy's actions are not finite; what a hook or an environment raises passes.
        """
        watch = _Watch(self.timing)
        episodes: list[_Episode] = []
        try:
            for cell in group.cells:
                env = self._timed("env_s", self.environments.take, cell.task)
                episodes.append(self._timed("env_s", _Episode.start, cell, env, self.actor.n_seen))
            rows = [episode.row for episode in episodes]
            # what nobody runs looks like the first row
            rows += [Row(rows[0].cell, None, rows[0].seen, False)] * (self.n_rows - len(rows))
            capture = [hook for watcher in self.watchers for hook in watcher.hooks([row.cell for row in rows])]
            with self.actor.acting(rows, len(episodes), capture):
                for part in self._steps(episodes, rows):
                    # what the caller does meanwhile is not this one's work
                    watch.stop()
                    yield part
                    watch.start()
        finally:
            for episode in episodes:
                self.environments.give_back(episode.row.cell.task, episode.row.env)
            watch.stop()

    def _steps(self, episodes: Sequence[_Episode], rows: Sequence[Row]) -> Iterator[Part]:
        n = self.actor.n_action_steps
        for start in range(0, self.max_steps, n):
            actions = self._timed("policy_s", self.actor.act, rows, start)
            self.timing.chunks += 1
            yield from self._carry_out(episodes, actions, start)
            if not any(episode.row.running for episode in episodes):
                return

    def _carry_out(self, episodes: Sequence[_Episode], actions: np.ndarray, start: int) -> Iterator[Part]:
        """Take the actions that were planned at environment step `start`; episodes that end with them."""
        for env_step in range(start, min(start + self.actor.n_action_steps, self.max_steps)):
            for i, episode in enumerate(episodes):
                if episode.row.running:
                    part = self._step(episode, actions[i, env_step - start], env_step)
                    if part is not None:
                        self.timing.episodes += 1
                        yield part

    def _step(self, episode: _Episode, action: np.ndarray, env_step: int) -> Part | None:
        """One step of one episode; the finished episode if it was the last."""
        cell, n = episode.row.cell, self.actor.n_action_steps
        if not np.isfinite(action).all():
            raise ValueError(f"{cell}, environment step {env_step}: the policy's action is not finite: {action}")
        obs, info = episode.obs, episode.info
        # the policy next looks at a multiple of n, and then at the n_seen last observations
        look = -(env_step + 1) % n < self.actor.n_seen
        draw = look or any(watcher.draws_every_step for watcher in self.watchers)
        reward, terminated, truncated = self._timed("env_s", episode.step, action, look, draw)
        self.timing.env_steps += 1
        success = bool(episode.info["is_success"])
        episode.log.step(obs, info, action, (env_step // n, env_step % n), reward, success)
        for watcher in self.watchers:
            watcher.step(cell, env_step, obs, action, reward, episode.info)
        endings = {
            "success": success,
            "terminated": terminated,
            "truncated": truncated,
            "time limit": env_step + 1 == self.max_steps,
        }
        ending = next((name for name, true in endings.items() if true), None)
        if ending is None:
            return None
        episode.row.running = False
        part = episode.log.finish(self.model, self.suite.name, ending, episode.obs, episode.info)
        for watcher in self.watchers:
            watcher.end(part, episode.obs)
        return part

    def _timed(self, what: str, fn: Any, *args: Any) -> Any:
        began = time.perf_counter()
        result = fn(*args)
        setattr(self.timing, what, getattr(self.timing, what) + time.perf_counter() - began)
        return result
