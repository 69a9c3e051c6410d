"""What injecting recorded activations costs a rollout, as a ratio to the same episodes without injection.

A group of episodes is recorded, then run again and again in turns: without injection, and with the very values that it
had injected, so that all variants act alike, step by step; that they do is checked, bit for bit, before any ratio is
told. An injected run includes reading its donors from disk.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from harness import RESULTS, check_targets, compare, in_turns, machine, report, show, write_json
from rich.console import Console

from hooked_vla import HookedVLA
from hooked_vla.interventions.injection import Injection
from hooked_vla.interventions.injection_sites import choose_sites, residual_sites
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import spread_scenes
from hooked_vla.rollouts.injection import InjectionArm, same_scene, sources_of
from hooked_vla.rollouts.jobs import Task, Worker
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import make_plan, run_rollouts

# an injected rollout against the uninjected one
LIMIT = 1.15
MODELS = ("smolvla-tabletop", "pi05-tabletop", "xvla-tabletop")
SUITE, SEED = "goal", 700_000
PLAIN = "no injection"


def variants_of(model: HookedVLA, every: list[str]) -> dict[str, Injection]:
    """What is injected, by name."""
    expert = choose_sites(model, "expert")
    found = {
        "every residual": Injection(every, "error"),
        "expert's residual stream": Injection(expert, "error"),
        "one residual of the expert": Injection(expert[-1], "error"),
        "language tokens": Injection([name for name in every if name.startswith("vlm.")], "error", tokens="language"),
    }
    return found


def runners(name: str, episodes: int, folder: Path) -> tuple[dict[str, Callable[[], list[bytes]]], int]:
    """Each variant as a function that runs the episodes and returns what their tables hold; bytes recorded."""
    model = HookedVLA.from_pretrained(name)
    sites, options = residual_sites(model), Options(n_envs=episodes)
    with ActivationRecorder(folder / "recording", {"model": name}) as recorder:
        watcher = ActivationWatcher(recorder, sites)
        source = run_rollouts(model, SUITE, episodes, SEED, out=folder / "source", options=options, watchers=[watcher])
    found = sources_of(source.episodes)
    donors = same_scene(found, [each.scene for each in found])
    # a name that all have: it stands in the tables
    injected = {label: InjectionArm(BASELINE.name, folder / "recording", each, donors)
                for label, each in variants_of(model, sites).items()}  # fmt: skip
    arms: Mapping[str, Arm] = {PLAIN: BASELINE, **injected, f"{PLAIN}, again": BASELINE}
    scenes = spread_scenes([task.id for task in get_suite(SUITE).tasks], episodes, SEED)
    made: dict[str, Callable[[], list[bytes]]] = {}
    for label, arm in arms.items():
        plan = make_plan(model, SUITE, scenes, [arm], options, name)
        worker = Worker([plan.job], {0: model})
        [group] = plan.groups
        made[label] = lambda worker=worker, group=group: [part.steps for part in worker.run(Task(0, group))]
    size = sum(file.stat().st_size for file in ActivationRecording(folder / "recording").folder.rglob("*.safetensors"))
    return made, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="models that act in the tabletop")
    parser.add_argument("--quick", action="store_true", help="the first model only, few rounds")
    parser.add_argument("--rounds", type=int, help="calls of each variant (default 5, quick 3)")
    parser.add_argument("--episodes", type=int, default=8, help="side by side in one batch")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_injection_cpu.json", help="where the result goes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 5)
    rows, recorded = [], {}
    for name in options.models[:1] if options.quick else options.models:
        with tempfile.TemporaryDirectory() as folder:
            variants, recorded[name] = runners(name, options.episodes, Path(folder))
            plain = variants[PLAIN]()
            if apart := [label for label, run in variants.items() if run() != plain]:
                raise SystemExit(f"{name}: no time is told, because {apart} do not act as without injection")
            rows += compare(in_turns(variants, rounds, 0, name), name, [PLAIN])
    limits = {(row.size, row.variant): LIMIT for row in rows if row.variant != f"{PLAIN}, again"}
    targets = check_targets(rows, limits)
    about = {"machine": machine(options.threads), "suite": SUITE, "episodes": options.episodes, "rounds": rounds,
             "recorded_bytes": recorded}  # fmt: skip
    show(Console(), rows, targets)
    write_json(options.json, report(rows, targets, about))


if __name__ == "__main__":
    main()
