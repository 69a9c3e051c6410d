"""Injection in closed loop: arms that put recorded activations of other episodes into theirs, and prompts that change.

>>> sites = stream_sites(model, "expert")
>>> with ActivationRecorder("donors", {"suite": "goal", "seed": 0}) as recorder:
...     source = run_rollouts(model, "goal", 12, 0, out="source", watchers=[ActivationWatcher(recorder, sites)])
>>> sources = sources_of(source.episodes)
>>> arm = InjectionArm("replay", "donors", Injection(sites, "hold"), cross_seed(sources, sources))
>>> run_rollouts(model, "goal", 12, 0, out="injected", arms=[BASELINE, *with_controls([arm])])

What an injection shows is more than noise of its size does: matched_noise.py has that control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.names import resolve
from hooked_vla.interventions.injection import Donor, Held, Injection, Injector
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.activation_reader import ActivationRecording, Key
from hooked_vla.rollouts.cells import Cell, Scene

with needs_sim_extra():
    import pyarrow as pa

# of a group's donors, in memory while the group runs
MAX_BYTES = 4 * 2**30
Donors = Mapping[Scene, int]


@dataclass(frozen=True)
class Told:
    """What the policy is told from an environment step on, until the next such entry.

    text: for every episode, or by scene; None: the episode's own instruction. The policy hears of it when it next plans
    (at multiples of the number of actions that it executes of a chunk).
    """

    text: str | Mapping[Scene, str] | None
    start: int = 0

    def at(self, cell: Cell) -> str | None:
        """Raises KeyError for a scene that has no text."""
        if self.text is None or isinstance(self.text, str):
            return self.text
        scene = Scene(cell.task, cell.seed)
        if scene not in self.text:
            raise KeyError(f"{cell}: nobody says what it is told from env_step {self.start} on")
        return self.text[scene]

    def describe(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        plain = self.text is None or isinstance(self.text, str)
        return {"start": self.start, "text": self.text if plain else _listed(self.text)}


@dataclass(frozen=True)
class ToldArm:
    """The policy is told something else, from some environment step on: `told`, each entry until the next one's start.

    Raises ValueError for no entries, or two of them from the same step on.
    """

    name: str
    told: Sequence[Told]

    def __post_init__(self) -> None:
        object.__setattr__(self, "told", _sorted(self.told, self.name))
        if not self.told:
            raise ValueError(f"arm {self.name!r} tells nothing; an arm without edits is BASELINE")

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "prompt", "told": [each.describe() for each in self.told]}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return ()

    def observe(self, cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]:
        """The frame with what the policy is told at this step."""
        return tell(self.told, cell, env_step, frame)


@dataclass(frozen=True)
class InjectionArm:
    """Episodes into which those of a recording are injected, each cell's own donor.

    recording: a folder that an ActivationRecorder wrote, in which all sites of the injection are; it must be there
    when the arm is used. donors: scene -> the donor's episode number in the recording. told: as ToldArm has it; none:
    the episode's own instruction. max_bytes: what a group's donors may take in memory, where they are held while the
    group runs.
    """

    name: str
    recording: Path | str
    injection: Injection
    donors: Donors
    told: Sequence[Told] = ()
    max_bytes: int = field(default=MAX_BYTES)

    def __post_init__(self) -> None:
        """Raises ValueError for no donors."""
        object.__setattr__(self, "told", _sorted(self.told, self.name))
        if not self.donors:
            raise ValueError(f"arm {self.name!r} has no donors")

    def describe(self) -> Mapping[str, Any]:
        """The injection, its donors, and what the recording says of itself.

        Raises FileNotFoundError where the recording is not there; ValueError where it lacks a donor.
        """
        recording = open_recording(self.recording)
        if missing := sorted(set(self.donors.values()) - set(recording.episodes)):
            raise ValueError(f"arm {self.name!r}: donors {missing[:10]} are not in the recording {self.recording}")
        return {
            "kind": "injection",
            "injection": self.injection.describe(),
            "recording": dict(recording.about),
            "donors": _listed(self.donors),
            "told": [each.describe() for each in self.told],
        }

    def observe(self, cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]:
        """The frame with what the policy is told at this step."""
        return tell(self.told, cell, env_step, frame)

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """One hook at all sites; what it injects is read now, for the whole group.

        Raises KeyError for a cell without donor, or sites that were not recorded; MemoryError where the donors need
        more than max_bytes.
        """
        wanted = [self._episode(cell) if cell.arm == self.name else None for cell in rows]
        recording = open_recording(self.recording)
        sites = resolve(list(self.injection.sites), list(recording.sites))
        loaded = load_donors(recording, sorted({each for each in wanted if each is not None}), sites, self.injection,
                             self.max_bytes, f"arm {self.name!r}")  # fmt: skip
        donors = [None if each is None else loaded[each] for each in wanted]
        return Injector(self.injection, donors, f"arm {self.name!r}").requests()

    def _episode(self, cell: Cell) -> int:
        scene = Scene(cell.task, cell.seed)
        if scene not in self.donors:
            raise KeyError(f"arm {self.name!r} has no donor for {cell}")
        return self.donors[scene]


def tell(told: Sequence[Told], cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]:
    """The frame with what is told at an environment step; the frame itself where that is its own instruction."""
    now = [each for each in told if each.start <= env_step]
    text = now[-1].at(cell) if now else None
    return frame if text is None else {**frame, "instruction": text}


def load_donors(
    recording: ActivationRecording, episodes: Sequence[int], sites: Sequence[str], injection: Injection, max_bytes: int,
    label: str,
) -> dict[int, Donor]:  # fmt: skip
    """What an injection takes of some recorded episodes, in memory.

    Only environment and denoise steps that it uses are read, and the last one, which "hold" goes on with. What is the
    same at all denoise steps is held once.
    Raises KeyError for an episode or site that was not recorded, MemoryError where it comes to more than max_bytes,
    ValueError where files are damaged. label: what messages call the injection.
    """
    held: dict[int, dict[str, dict[int, Held]]] = {episode: {} for episode in episodes}
    n_bytes = 0
    for site in sites:
        keys = _keys(recording, site, episodes, injection, label)
        moments: dict[tuple[int, int], dict[int | None, torch.Tensor]] = {}
        for (episode, env_step, step), value in zip(keys, recording.fetch_each(site, keys), strict=True):
            moments.setdefault((episode, env_step), {})[step] = value
        for (episode, env_step), values in moments.items():
            each = _hold(recording, site, episode, env_step, values)
            held[episode].setdefault(site, {})[env_step] = each
            n_bytes += each.nbytes
        if n_bytes > max_bytes:
            raise MemoryError(
                f"{label}: up to {site}, its donors (episodes {list(episodes)[:10]}) come to {n_bytes:,} bytes, more "
                f"than max_bytes={max_bytes:,}: inject at fewer sites, or in a window, or run fewer rows (n_envs)"
            )
    return {episode: Donor(f"episode {episode} of {recording.folder}", sites_) for episode, sites_ in held.items()}


def _keys(
    recording: ActivationRecording, site: str, episodes: Sequence[int], injection: Injection, label: str
) -> list[Key]:
    """What has to be read of a site."""
    by_episode: dict[int, list[Key]] = {episode: [] for episode in episodes}
    for key in recording.keys(site):
        if key[0] in by_episode:
            by_episode[key[0]].append(key)
    found: list[Key] = []
    for episode, keys in by_episode.items():
        if not keys:
            raise KeyError(f"{label}: {site} of episode {episode} is not in the recording {recording.folder}")
        last = max(key[1] for key in keys)
        denoise = injection.denoise
        found += [
            key for key in keys
            if (key[1] == last or injection.is_active(key[1]))
            and (denoise is None or key[2] is None or key[2] in denoise)  # pyright: ignore[reportOperatorIssue]
        ]  # fmt: skip
    return found


def _hold(
    recording: ActivationRecording, site: str, episode: int, env_step: int, values: Mapping[int | None, torch.Tensor]
) -> Held:
    first, *others = values.values()
    step, segments = next(iter(values)), None
    if axes := recording.token_axes(episode, env_step, site, step):
        segments = recording.segments(episode, env_step, site, step, axes[0])
    if step is None:
        return Held(first[None], None, segments)
    same = all(torch.equal(value, first) for value in others)
    numbers = tuple(each for each in values if each is not None)
    return Held(first[None] if same else torch.stack([first, *others]), numbers, segments)


# Who is whose donor.


@dataclass(frozen=True)
class Source:
    """A recorded episode that may be a donor."""

    episode: int
    scene: Scene


def sources_of(episodes: pa.Table, arm: str = "baseline") -> list[Source]:
    """The episodes of one arm in a sweep's table. Raises ValueError where there is none."""
    columns = (episodes[name].to_pylist() for name in ("episode", "arm", "task", "seed"))
    found = [
        Source(number, Scene(task, seed)) for number, each, task, seed in zip(*columns, strict=True) if each == arm
    ]
    if not found:
        raise ValueError(f"no episodes of the arm {arm!r}")
    return found


def same_scene(sources: Sequence[Source], scenes: Sequence[Scene]) -> dict[Scene, int]:
    """Every scene's own episode. Raises ValueError where a scene has none."""
    return _choose(sources, scenes, lambda source, scene: source.scene == scene, "of the same task and seed")


def same_start(sources: Sequence[Source], scenes: Sequence[Scene]) -> dict[Scene, int]:
    """For every scene an episode of another task from the same seed: the same start, where tasks share a scene.

    Raises ValueError where a scene has none.
    """
    return _choose(
        sources, scenes, lambda source, scene: source.scene.seed == scene.seed and source.scene.task != scene.task,
        "of another task from the same seed",
    )  # fmt: skip


def cross_seed(sources: Sequence[Source], scenes: Sequence[Scene]) -> dict[Scene, int]:
    """For every scene an episode of the same task from another seed. Raises ValueError where a scene has none."""
    return _choose(
        sources, scenes, lambda source, scene: source.scene.task == scene.task and source.scene.seed != scene.seed,
        "of the same task from another seed",
    )  # fmt: skip


def cross_task(sources: Sequence[Source], scenes: Sequence[Scene]) -> dict[Scene, int]:
    """For every scene an episode of another task from another seed. Raises ValueError where a scene has none."""
    return _choose(
        sources, scenes, lambda source, scene: source.scene.task != scene.task and source.scene.seed != scene.seed,
        "of another task from another seed",
    )  # fmt: skip


def _choose(sources: Sequence[Source], scenes: Sequence[Scene], fits: Any, what: str) -> dict[Scene, int]:
    """The first that fits behind the scene's own place, so that donors differ from scene to scene."""
    found = {}
    for i, scene in enumerate(scenes):
        turned = [*sources[i + 1 :], *sources[: i + 1]]
        donor = next((source for source in turned if fits(source, scene)), None)
        if donor is None:
            raise ValueError(f"no donor {what} for {scene} among {len(sources)} recorded episodes")
        found[scene] = donor.episode
    return found


def _sorted(told: Sequence[Told], name: str) -> tuple[Told, ...]:
    starts = [each.start for each in told]
    if len(set(starts)) != len(starts) or min(starts, default=0) < 0:
        raise ValueError(f"arm {name!r}: what is told starts at different env_steps from 0 on, got {starts}")
    return tuple(sorted(told, key=lambda each: each.start))


def _listed(by_scene: Any) -> list[list[Any]]:
    return [[scene.task, scene.seed, value] for scene, value in by_scene.items()]


def open_recording(folder: Path | str) -> ActivationRecording:
    """The recording as it is now; read once for all arms and groups of a process."""
    path = Path(folder).absolute()
    files = sorted((path / "index").glob("*/*"))
    return _opened(path, tuple((file.name, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _opened(folder: Path, _: tuple[Any, ...]) -> ActivationRecording:
    return ActivationRecording(folder)
