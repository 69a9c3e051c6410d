"""From nothing to a policy in a folder: frames, tower, demonstrations, imitation, corrections, evaluation, card.

Every stage leaves files that the next one reads and that are not made again, so the same command goes on where it
stopped.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from hooked_vla.folders import write_json
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.registry import get_spec
from hooked_vla.rollouts.manifest import differences
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.summary import Rate
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.training.batches import Prompting, encode
from hooked_vla.training.dataset import Moments, gather, load_shards, save_shard
from hooked_vla.training.demonstrations import Policy, Recorder
from hooked_vla.training.frames import load_frames, record_frames, save_frames
from hooked_vla.training.language import vocabulary
from hooked_vla.training.packaging import new_checkpoint
from hooked_vla.training.recipes import Recipe
from hooked_vla.training.tower import train_tower
from hooked_vla.training.trainer import Schedule, train
from hooked_vla.vla import HookedVLA

IMAGE_SIZE = 96
FRAMES = 50_000
_SHARD = 4000
_FEATURES = "features.safetensors"
# seeds of evaluation; demonstrations draw theirs from generators, none of which are near
EVALUATION_SEED = 700_000


@dataclass(frozen=True)
class Workshop:
    """Where a run's files are, and how much of the machine it takes. shared: what several models use (frames, towers,
    demonstrations); own: one model's; workers: processes that record."""

    shared: Path
    own: Path
    workers: int
    seed: int


def make_policy(recipe: Recipe, shop: Workshop) -> HookedVLA:
    """All stages but evaluation; the trained policy, which is also in `shop.own / "checkpoint"`.

    Raises ValueError where `shop.own` was begun with another recipe or seed.
    """
    claim(recipe, shop)
    finished = shop.own / "checkpoint"
    if (finished / "model.safetensors").exists():
        return HookedVLA.from_pretrained(finished)
    shards = demonstrations(recipe, shop)
    data = load_shards(shards)
    model = untrained(recipe, shop, data)
    load_tower(model, tower(recipe, model, shop))
    stages = [("imitation", recipe.schedule, data)]
    for number in range(recipe.corrections.rounds + 1):
        name, schedule, moments = stages[-1]
        batch = encode(model, moments, Prompting(), shop.seed, shop.own / name / _FEATURES)
        train(
            model, batch, schedule, recipe.readout, shop.own / name, shop.seed,
            evaluate=(1500, learning_curve(recipe)),
        )  # fmt: skip
        if number == recipe.corrections.rounds:
            break
        shards.append(correction(recipe, model, shop, number))
        stages.append((f"correction-{number}", _short(recipe), load_shards(shards)))
    model.save_pretrained(finished)
    # hundreds of megabytes that nobody reads again
    for path in shop.own.glob(f"*/{_FEATURES}"):
        path.unlink()
    return model


def claim(recipe: Recipe, shop: Workshop) -> None:
    """Make `shop.own` the folder of this recipe and seed, or find that it is.

    Raises ValueError naming what differs where it is that of others.
    """
    path, now = shop.own / "recipe.json", {"seed": shop.seed, **asdict(recipe)}
    if not path.is_file():
        write_json(path, now)
    elif found := differences(json.loads(path.read_text()), now):
        raise ValueError(
            f"{shop.own} was begun with other settings: {'; '.join(text for _, text in found)}. Go on with those, or "
            "train into another folder"
        )


def untrained(recipe: Recipe, shop: Workshop, data: Moments) -> HookedVLA:
    """Random weights in a checkpoint folder."""
    reads = get_spec(recipe.spec, "tabletop").features.max_text > 0
    words = vocabulary(recipe.words) if reads else []
    values = {"observation.state": data.state, "action": data.chunk}
    model = new_checkpoint(recipe.spec, shop.own / "untrained", words, values, shop.seed)
    for name, factor in recipe.scaled.items():
        model.net.get_parameter(name).data.mul_(factor)
    return model


def demonstrations(recipe: Recipe, shop: Workshop) -> list[Path]:
    """Shards of the disturbed expert's moments; those of models with the same suites, cameras and chunk are shared."""
    spec = get_spec(recipe.spec, "tabletop")
    chunk = _chunk(spec)
    told = [f"retold{recipe.retold:g}"] if recipe.retold else []
    name = "-".join(["demonstrations", *recipe.suites, *spec.features.cameras, str(chunk), *told])
    folder = shop.shared / name
    paths = [folder / f"{i:03d}.safetensors" for i in range(-(-recipe.moments // _SHARD))]
    jobs = [
        (path, (dict(recipe.suites), spec.features.cameras, chunk, recipe.retold, shop.seed * 10_000 + i, path))
        for i, path in enumerate(paths)
    ]
    _in_parallel(_record_demonstrations, jobs, shop.workers, "demonstrations")
    return paths


def _record_demonstrations(
    suites: dict[str, float], cameras: Sequence[str], chunk: int, retold: float, seed: int, path: Path
) -> None:
    recorder = Recorder(suites, cameras, IMAGE_SIZE, chunk, seed, retold=retold)
    save_shard(path, gather(recorder.episodes(1), recorder.names, _SHARD, lambda n: None))


def correction(recipe: Recipe, model: HookedVLA, shop: Workshop, number: int) -> Path:
    """A shard of the policy's own episodes with what the expert would have done."""
    path = shop.own / f"correction-{number}.safetensors"
    if not path.exists():
        cameras = model.spec.features.cameras
        seed, chunk = shop.seed + 777 + number, _chunk(model.spec)
        recorder = Recorder(dict(recipe.suites), cameras, IMAGE_SIZE, chunk, seed, retold=recipe.retold)
        with tqdm(total=recipe.corrections.moments, desc=f"corrections {number}", unit="moment") as bar:
            episodes = recorder.episodes(16, lambda n: Policy(model))
            save_shard(path, gather(episodes, recorder.names, recipe.corrections.moments, bar.update))
    return path


def tower(recipe: Recipe, model: HookedVLA, shop: Workshop) -> Path:
    """Weights of the model's vision tower; models whose towers have the same parameters share them."""
    cameras = model.spec.features.cameras
    folder = shop.shared / "-".join(["frames", *cameras])
    shapes = sorted(f"{name}{tuple(each.shape)}" for name, each in model.net.get_submodule("vision").named_parameters())
    path = shop.shared / "towers" / f"{_digest(shapes)}.safetensors"
    if path.exists():
        return path
    files = [folder / f"{i:03d}.safetensors" for i in range(FRAMES // _SHARD)]
    jobs = [(file, (cameras, 90_000 + i, file)) for i, file in enumerate(files)]
    _in_parallel(_record_frames, jobs, shop.workers, "frames")
    torch.manual_seed(shop.seed)
    with tqdm(total=recipe.tower_steps, desc="vision tower", unit="step") as bar:
        for loss, _ in train_tower(model, load_frames(files).shuffled(32, shop.seed), recipe.tower_steps):
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    state = model.net.get_submodule("vision").state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, [(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in sorted(state.items())], {})
    return path


def _record_frames(cameras: Sequence[str], seed: int, path: Path) -> None:
    save_frames(path, record_frames(cameras, IMAGE_SIZE, seed, _SHARD))


def load_tower(model: HookedVLA, path: Path) -> None:
    """Put a tower's weights into the model."""
    model.net.get_submodule("vision").load_state_dict(load_file(path))


def evaluate(
    model: HookedVLA, suites: Sequence[str], episodes: int, seed: int = EVALUATION_SEED, progress: bool = False
) -> dict[str, Rate]:
    """Success by suite, in `episodes` of each; episode i starts from `seed + i`."""
    return {
        suite: run_rollouts(model, suite, episodes, seed, options=Options(n_envs=12), progress=progress)
        .summary["baseline"].overall
        for suite in suites
    }  # fmt: skip


def learning_curve(recipe: Recipe) -> Callable[[HookedVLA], dict[str, float]]:
    """Success while training, on few episodes of the first suite that is trained on."""
    suite = next(iter(recipe.suites))
    seed = EVALUATION_SEED + 5000
    return lambda model: {suite: evaluate(model, [suite], 24, seed, progress=True)[suite].success_rate}


def checks_while_training(shop: Workshop) -> list[dict[str, float]]:
    """Rows of the learning curve of the imitation: "step", and success by suite."""
    with (shop.own / "imitation" / "curve.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _short(recipe: Recipe) -> Schedule:
    """The schedule of a round of corrections."""
    return replace(recipe.schedule, steps=recipe.corrections.steps, rate=recipe.schedule.rate / 2, warmup=50)


def _chunk(spec: Any) -> int:
    """Actions that the model predicts at once."""
    for holder in (spec, *(getattr(spec, part, None) for part in ("flow", "sampler", "readout"))):
        if (chunk := getattr(holder, "chunk", None)) is not None:
            return chunk
    raise TypeError(f"{spec.name}: its spec does not say how many actions a chunk has")


def _digest(lines: Sequence[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()[:12]


def _in_parallel(
    work: Callable[..., None], jobs: Sequence[tuple[Path, tuple[Any, ...]]], workers: int, name: str
) -> None:
    """Do the jobs whose file is not there yet, in processes of their own."""
    todo = [arguments for path, arguments in jobs if not path.exists()]
    if not todo:
        return
    # one thread each: more of them than cores would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc=name, unit="file"
    ) as bar:  # fmt: skip
        for done in as_completed([pool.submit(work, *arguments) for arguments in todo]):
            done.result()
            bar.update()
