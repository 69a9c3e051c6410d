"""The library's main job on simulated input: a trained policy acts, is looked into, and is patched to another goal.

Runs A and B see the same scene and differ in nothing but the instruction. Every arm starts from the same noise, so
whatever differs between two action chunks was put there. Needs the `sim` extra.
"""

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor

from hooked_vla.analysis.attention import CameraView, camera_attention, camera_views
from hooked_vla.folders import new_folder
from hooked_vla.hooks import ActivationCache, HookPoint
from hooked_vla.hooks.names import resolve
from hooked_vla.inputs import ACTION, LANGUAGE, PAD, STATE, Observation, image_segment
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.vla import HookedVLA

MODEL = "pi05-tabletop"
NOTICE = f"{MODEL}: a small π0.5 trained on the tabletop, in one scene"
# tasks of the goal suite; the instructions are equally long, so that token positions correspond
GOALS = {"A": "red-orange", "B": "blue-cyan"}
RESIDUALS_AND_PATTERNS = ("*.hook_resid_pre", "*.hook_resid_mid", "*.hook_resid_post", "*.hook_pattern")
PATCHED = ("{}.blocks.*.hook_resid_pre", "{}.blocks.*.hook_resid_post")
EPISODES = 24
# starts that no model was trained on
SEED = 810_000
ALL = "all"
N_RANDOM = 3
# folder of the episodes' record, beside the pictures
RECORD = "goals"
# of the extra `atlas`, beyond those of the demonstration
ATLAS_PACKAGES = ("duckdb", "fastapi", "plotly", "uvicorn")
PACKAGES = ("hooked-vla", "torch", "numpy", "mujoco", "gymnasium", "matplotlib")


@dataclass(frozen=True)
class Effect:
    """What an edit of run A did to its action chunk, measured by the difference between the chunks of runs B and A.

    displacement: |edited - A| / |B - A|. toward_b: the part of it along B - A; 1 is all the way.
    outcome: "replay" where the edited run gives B's actions bit for bit, "no effect" where it gives A's, or "partial".
    """

    displacement: float
    toward_b: float
    outcome: str


@dataclass(frozen=True)
class Patch(Effect):
    """The effect of giving the tokens of `segment` run B's residual stream at `site`, in run A.

    random_displacement: mean displacement by edits in random directions, of the same length at every token.
    """

    site: str
    segment: str
    n_tokens: int
    random_displacement: float


class Pair:
    """Runs A and B of one model from the same noise; everything else is measured against them."""

    def __init__(self, model: HookedVLA, a: Observation, b: Observation, noise: Tensor) -> None:
        self.model, self.a, self.b, self.noise = model, a, b, noise
        self.segments = model.segments(model.prepare(a))["vlm"]
        if not torch.equal(self.segments.labels, model.segments(model.prepare(b))["vlm"].labels):
            raise ValueError("the two observations give different token layouts; use instructions of equal length")
        self.chunk_a, self.chunk_b = self.chunk(a, noise), self.chunk(b, noise)
        if torch.equal(self.chunk_a, self.chunk_b):
            raise ValueError("the two observations give the same actions: there is no difference to explain")

    def chunk(self, obs: Observation, noise: Tensor) -> Float[Tensor, "batch step d_action"]:
        return self.model(obs, noise).normalized

    def effect(self, chunk: Float[Tensor, "batch step d_action"]) -> Effect:
        moved, whole = ((each - self.chunk_a).double().flatten() for each in (chunk, self.chunk_b))
        exact = {"replay": self.chunk_b, "no effect": self.chunk_a}
        return Effect(
            displacement=float(moved.norm() / whole.norm()),
            toward_b=float(moved @ whole / whole.norm() ** 2),
            outcome=next((name for name, target in exact.items() if torch.equal(chunk, target)), "partial"),
        )

    def edited(self, site: str, edit: Callable[[Tensor, HookPoint], Tensor]) -> Effect:
        """The effect of an edit of run A."""
        with self.model.hooks([(site, edit)]):
            return self.effect(self.chunk(self.a, self.noise))

    def patch(
        self,
        source: ActivationCache,
        site: str,
        segment: str,
        mask: Bool[Tensor, "batch seq"],
        generator: torch.Generator,
    ) -> Patch:
        """A patch from the cached run, and its random controls."""

        def donor(hook: HookPoint) -> Tensor:
            cached = source[site]
            return cached if hook.denoise_step is None else cached[hook.denoise_step]

        def give_tokens(value: Tensor, hook: HookPoint) -> Tensor:
            return torch.where(mask[..., None], donor(hook), value)

        def push_at_random(value: Tensor, hook: HookPoint) -> Tensor:
            direction = torch.randn(value.shape, generator=generator)
            direction *= (donor(hook) - value).norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
            return torch.where(mask[..., None], value + direction, value)

        effect = self.edited(site, give_tokens)
        pushes = [self.edited(site, push_at_random).displacement for _ in range(N_RANDOM)]
        return Patch(
            **asdict(effect), site=site, segment=segment, n_tokens=int(mask.sum()),
            random_displacement=sum(pushes) / N_RANDOM,
        )  # fmt: skip


def run_demo(out: Path, seed: int = 0, episodes: int = EPISODES) -> dict[str, Any]:
    """Run the demonstration; write demo.json, its pictures, a film and a record of the episodes into `out`, and return
    the numbers. What an earlier demonstration left there is replaced.

    seed: of the scene that is looked into; episodes: of the goal suite, to say how well the policy acts.
    Raises ModuleNotFoundError naming the `sim` extra where it is not installed, FileExistsError for an `out` whose
    folder RECORD holds something else.
    """
    with needs_sim_extra():
        from hooked_vla import demo_figures as show
        from hooked_vla.demo_goals import draw_noise, run_goals
        from hooked_vla.rollouts.settings import torch_threads
        from hooked_vla.rollouts.sweep import run_rollouts
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    check_replaceable(out / RECORD)
    out.mkdir(parents=True, exist_ok=True)
    console, clock, generator = Console(), Clock(), torch.Generator().manual_seed(seed)
    results: dict[str, Any] = {"notice": NOTICE}
    # at this size threads cost more than they give, and on one results repeat bit for bit
    with torch_threads(1), torch.no_grad():
        model = HookedVLA.from_pretrained(MODEL)
        console.print(f"[bold]{NOTICE}[/bold]")
        results["settings"] = settings(model, seed, episodes)
        show.print_hook_points(console, model.hook_points)
        clock.lap("model")

        done = run_rollouts(model, "goal", episodes, SEED, name=MODEL, progress=True)
        results["success"] = done.summary["baseline"].overall.to_json()
        clock.lap("episodes")
        show.print_success(console, results["success"])

        with new_folder(out / RECORD) as record:
            outcomes = run_goals(model, MODEL, GOALS, SEED + seed, record)
        results["goals"] = {outcome.copy.name: outcome.numbers() for outcome in outcomes}
        clock.lap("goals")
        show.print_goals(console, results["goals"])

        observations = observe(SEED + seed)
        results["instructions"] = {name: str(obs.instruction) for name, obs in observations.items()}
        pair = Pair(model, observations["A"], observations["B"], draw_noise(model, generator))
        n_bytes = model.cache_size(pair.a, RESIDUALS_AND_PATTERNS)
        console.print(f"cache_size of every residual and attention pattern: {n_bytes:,} bytes")
        actions, cache = model.run_with_cache(pair.a, RESIDUALS_AND_PATTERNS, pair.noise)
        console.print(f"cached: {cache!r}")
        assert actions is not None
        results["cache"] = {"tensors": len(cache), "predicted_bytes": n_bytes, "held_bytes": cache.nbytes}
        views = {"vision": camera_views(model, pair.a, tower=True)}
        views |= dict.fromkeys(("vlm", "expert"), camera_views(model, pair.a))
        results["attention"] = attention_maps(cache, views)
        clock.lap("attention")

        results["controls"] = controls(pair, actions.normalized, draw_noise(model, generator))
        results["input_swaps"] = {name: asdict(effect) for name, effect in input_swaps(pair).items()}
        vlm, expert = patch_vlm(pair, generator), patch_expert(pair, generator)
        results["vlm_patches"], results["expert_patches"] = ([asdict(each) for each in part] for part in (vlm, expert))
        results["controls"]["swap_minus_first_patch"] = swap_minus_first_patch(results)
        clock.lap("patches")
        show.print_effects(console, results)

        pictures = {
            "attention.png": lambda path: show.draw_attention(path, results, pair.a.images, views),
            "patch_effect.png": lambda path: show.draw_effects(path, results),
            "goals.png": lambda path: show.draw_goals(path, results, pair.a.images["top"]),
            "goals.mp4": lambda path: show.film_goals(path, outcomes, out / RECORD),
        }
        for name, draw in pictures.items():
            write_whole(out / name, draw)
        clock.lap("figures")
    results["seconds"] = clock.laps | {"total": sum(clock.laps.values())}
    write_whole(out / "demo.json", lambda path: path.write_text(json.dumps(results, indent=1, allow_nan=False)))
    seconds = results["seconds"]["total"]
    console.print(
        f"wrote {', '.join(pictures)}, demo.json and the episodes in {RECORD}/ to {out}; {seconds:.1f} s in all",
        markup=False,
    )
    console.print(how_to_look(out), markup=False, highlight=False, soft_wrap=True)
    return results


def observe(seed: int) -> dict[str, Observation]:
    """The first observation of the scene, with each goal's instruction."""
    from hooked_vla.rollouts.suites import observation
    from hooked_vla.rollouts.tabletop import TabletopEnv

    env = TabletopEnv("goal", GOALS["A"], cameras=("top", "wrist"))
    seen = {name: observation(env.reset(seed=seed, options={"task": task})[0]) for name, task in GOALS.items()}
    env.close()
    return seen


def attention_maps(cache: ActivationCache, views: Mapping[str, Mapping[str, CameraView]]) -> dict[str, dict[str, Any]]:
    """Attention that each camera's tokens receive, by three readers; mean over layers, heads, queries (and steps).

    views: of the tokens that each reader reads, by camera.
    grid: per token, rows from the top, as a multiple of uniform attention over the keys that the query sees.
    share, uniform_share: fraction of all attention that goes to the camera, and would if it were uniform.
    """
    # an expert that reads images by cross-attention does so in every other layer; else it reads them in all
    crossed = any(".cross_attn." in name for name in cache)
    readers = {
        "vision": ("vision.blocks.*.attn.hook_pattern", None),
        "vlm": ("vlm.blocks.*.attn.hook_pattern", LANGUAGE),
        "expert": (f"expert.blocks.*.{'cross_attn' if crossed else 'attn'}.hook_pattern", ACTION),
    }
    found: dict[str, dict[str, Any]] = {}
    for reader, (sites, query) in readers.items():
        for view in views[reader].values():
            seen = [camera_attention(cache, site, view, query) for site in resolve(sites, list(cache))]
            found.setdefault(reader, {})[view.source] = {
                "grid": torch.stack([each.relative.mean((0, 1, 2)) for each in seen]).mean(0).tolist(),
                "share": float(torch.stack([each.share for each in seen]).mean()),
                "uniform_share": float(torch.stack([each.uniform.sum((-2, -1)) for each in seen]).mean()),
            }
    return found


def controls(pair: Pair, actions_with_cache: Tensor, other_noise: Tensor) -> dict[str, Any]:
    """What the effects are to be held against: runs that should change nothing, and one that only redraws noise."""
    rerun = pair.effect(pair.chunk(pair.a, pair.noise))
    kept = pair.edited("*.hook_resid_pre", lambda value, _: value.clone())
    redrawn = pair.effect(pair.chunk(pair.a, other_noise))
    return {
        "rerun_displacement": rerun.displacement,
        "identity_edit_displacement": kept.displacement,
        "watching_patterns_displacement": pair.effect(actions_with_cache).displacement,
        "other_noise_displacement": redrawn.displacement,
        "norm_of_a": float(pair.chunk_a.norm()),
        "norm_of_b_minus_a": float((pair.chunk_b - pair.chunk_a).norm()),
    }


def input_swaps(pair: Pair) -> dict[str, Effect]:
    """Run A with one part of the observation taken from B, by the name of the part's token segment."""
    a, b = pair.a, pair.b
    # what the runs share is swapped too: it must change nothing
    swapped = {image_segment(camera): replace(a, images={**a.images, camera: b.images[camera]}) for camera in a.images}
    swapped |= {LANGUAGE: replace(a, instruction=b.instruction), STATE: replace(a, state=b.state), ALL: b}
    return {name: pair.effect(pair.chunk(obs, pair.noise)) for name, obs in swapped.items()}


def swap_minus_first_patch(results: dict[str, Any]) -> float:
    """Largest difference between swapping an input and patching the same tokens where they enter the first block."""
    first = [patch for patch in results["vlm_patches"] if patch["site"] == results["vlm_patches"][0]["site"]]
    return max(abs(patch[key] - results["input_swaps"][patch["segment"]][key])
               for patch in first for key in ("displacement", "toward_b"))  # fmt: skip


def patch_vlm(pair: Pair, generator: torch.Generator) -> list[Patch]:
    """Each segment's residual stream, at each layer of the language model."""
    sites = [pattern.format("vlm") for pattern in PATCHED]
    _, source = pair.model.run_with_cache(pair.b, sites, pair.noise)
    masks = {name: pair.segments.mask(name) for name in pair.segments.present() if name != PAD}
    masks[ALL] = torch.ones_like(pair.segments.labels, dtype=torch.bool)
    return [
        pair.patch(source, site, segment, mask, generator)
        for site in source.resid_labels("vlm")
        for segment, mask in masks.items()
    ]


def patch_expert(pair: Pair, generator: torch.Generator) -> list[Patch]:
    """All action tokens' residual stream, at each layer of the expert and every denoise step."""
    _, source = pair.model.run_with_cache(pair.b, [pattern.format("expert") for pattern in PATCHED], pair.noise)
    labels = source.resid_labels("expert")
    mask = torch.ones(source[labels[0]].shape[1:3], dtype=torch.bool)
    return [pair.patch(source, site, ALL, mask, generator) for site in labels]


def settings(model: HookedVLA, seed: int, episodes: int) -> dict[str, Any]:
    """What is needed to repeat the run, and the machine that its seconds belong to."""
    return {
        "model": MODEL,
        "seed": seed,
        "episodes": episodes,
        "goals": GOALS,
        "n_random_directions": N_RANDOM,
        "n_parameters": sum(each.numel() for each in model.parameters()),
        "n_hook_points": len(model.points),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, 1 thread",
    }


class Clock:
    """Seconds spent in each part, from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError for a folder that holds anything but the record of an earlier demonstration."""
    if not folder.exists():
        return
    try:
        arms = json.loads((folder / "manifest.json").read_text())["arms"]
    except (OSError, ValueError, KeyError, TypeError):
        arms = ()
    if not isinstance(arms, dict) or not {*GOALS, "A, patched at block 0"} <= set(arms):
        raise FileExistsError(f"{folder} holds something other than a demonstration's episodes: choose another folder")


def how_to_look(out: Path) -> str:
    """What to type to see the episodes in the browser, as this process was started."""
    beside = Path(sys.executable).with_name("hooked-vla")
    program = "hooked-vla" if shutil.which("hooked-vla") or not beside.exists() else os.path.relpath(beside)
    command = f"{program} atlas {shlex.quote(str(out))}"
    if all(find_spec(name) is not None for name in ATLAS_PACKAGES):
        return f"see the patched robot beside the one that it was: {command}"
    return f"to see the patched robot beside the one that it was: pip install 'hooked-vla[atlas]', then {command}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file that appears under its name only when complete."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
