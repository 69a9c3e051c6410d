"""Frames of the tabletop with the place of every object in them: what a small vision tower is pretrained on.

Scenes come from noisy expert trajectories over all suites' tasks, so that the hand and held blocks look as they will.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from safetensors.numpy import load_file, save
from tqdm import tqdm

from hooked_vla.folders import write_file
from hooked_vla.rollouts.tabletop import BLOCKS, PADS, TASKS, TabletopEnv

# what a frame may show, in the order of `Frames.places`
OBJECTS = (*BLOCKS, *(f"pad_{name}" for name in PADS), "cup")
_STRIDE = 3


@dataclass(frozen=True)
class Frames:
    """Moments seen by several cameras.

    places: column and row of every object's centre in the image, 0..1 from the left and top; NaN where it is out of
    the picture or not in the scene.
    """

    images: UInt8[np.ndarray, "frame camera height width 3"]
    places: Float32[np.ndarray, "frame camera object 2"]

    def __len__(self) -> int:
        return len(self.images)

    def shuffled(self, size: int, seed: int) -> "Iterator[Frames]":
        """Endless batches of `size` frames, drawn with replacement."""
        rng = np.random.default_rng(seed)
        while True:
            rows = np.sort(rng.integers(len(self), size=size))
            yield Frames(self.images[rows], self.places[rows])


def record_frames(cameras: Sequence[str], image_size: int, seed: int, n: int) -> Frames:
    """`n` frames, the same for the same seed."""
    images, places = zip(*islice(_frames(cameras, image_size, seed), n), strict=True)
    return Frames(np.stack(images), np.stack(places))


def save_frames(path: Path, frames: Frames) -> None:
    """Write frames; the file appears when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save({"images": frames.images, "places": frames.places}))


def load_frames(paths: Sequence[Path]) -> Frames:
    """Frames of several files."""
    parts = [load_file(path) for path in tqdm(paths, desc="reading frames", unit="file")]
    return Frames(*(np.concatenate([part[name] for part in parts]) for name in ("images", "places")))


def _frames(
    cameras: Sequence[str], image_size: int, seed: int
) -> Iterator[tuple[UInt8[np.ndarray, "camera height width 3"], Float32[np.ndarray, "camera object 2"]]]:
    rng = np.random.default_rng(seed)
    # one environment a scene: each has a renderer of its own
    scenes = {(suite, task.blocks, task.pads): task.id for suite, tasks in TASKS.items() for task in tasks}
    envs = [TabletopEnv(suite, task, image_size, ()) for (suite, _, _), task in scenes.items()]
    # scenes with every object in them show most
    weights = np.array([len(env.task.blocks) + len(env.task.pads) for env in envs], float) ** 2
    while True:
        env = envs[rng.choice(len(envs), p=weights / weights.sum())]
        tasks = [task.id for task in TASKS[env.suite] if (task.blocks, task.pads) == (env.task.blocks, env.task.pads)]
        env.reset(seed=int(rng.integers(2**31)), options={"task": str(rng.choice(tasks))})
        noise = rng.choice([0.3, 1.0, 2.0])
        for step in range(int(rng.integers(_STRIDE, 50))):
            action = env.expert_action()
            action[:3] += noise * rng.standard_normal(3)
            env.advance(action)
            if step % _STRIDE == 0:
                yield (
                    np.stack([env.image(camera) for camera in cameras]),
                    np.stack([object_places(env, camera) for camera in cameras]),
                )


def object_places(env: TabletopEnv, camera: str) -> Float32[np.ndarray, "object 2"]:
    """Where a camera sees the centre of each of OBJECTS; see `Frames.places`."""
    positions = np.full((len(OBJECTS), 3), np.nan)
    for i, name in enumerate(OBJECTS):
        if name in env.task.blocks:
            positions[i] = env.data.body(name).xpos
        elif name.removeprefix("pad_") in env.task.pads:
            positions[i] = (*PADS[name.removeprefix("pad_")].xy, 0.0)
        elif name == "cup":
            positions[i] = env.data.site("rim").xpos
    places = project(env, camera, positions)
    inside = np.all((places >= 0) & (places < 1), axis=1)
    return np.where(np.reshape(inside, (-1, 1)), places, np.nan).astype(np.float32)


def project(env: TabletopEnv, camera: str, points: Float64[np.ndarray, "point 3"]) -> Float64[np.ndarray, "point 2"]:
    """Points of the world in a camera's image: column and row, 0..1 from the left and top."""
    view = env.data.cam(camera)
    along = (points - view.xpos) @ view.xmat.reshape(3, 3)
    half = np.tan(np.deg2rad(env.model.cam(camera).fovy[0]) / 2)
    # a MuJoCo camera looks along its -z axis, with y up
    offset = along[:, :2] * (1, -1) / (-along[:, 2:] * half)
    return np.where(along[:, 2:] < 0, 0.5 + 0.5 * offset, np.nan)
