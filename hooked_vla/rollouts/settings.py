"""What, besides model, suite, arms and seeds, decides how a sweep comes out; every value is explicit here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from hooked_vla import lerobot
from hooked_vla.hooks.kept import kept
from hooked_vla.policy import Processor
from hooked_vla.rollouts.suites import Suite
from hooked_vla.spec import FeatureSpec, ModelSpec
from hooked_vla.vla import HookedVLA

# side of camera images where neither the caller nor the model says one: the tabletop's own
IMAGE_SIZE = 96
# below this, one thread is faster than several (measured on models of the tabletop's size)
SMALL_MODEL = 50_000_000


@dataclass(frozen=True)
class Options:
    """What may be said of how a sweep runs; None leaves it to the suite (max_steps) or the model (all others).

    The entries are those of `Settings`. n_action_steps: by default the checkpoint's; image_size: by default as large
    as the model reads images; cameras: by default those of equal names; threads: by default one for small models.
    """

    n_envs: int = 8
    max_steps: int | None = None
    n_action_steps: int | None = None
    image_size: int | None = None
    cameras: Mapping[str, str] | None = None
    unnorm_key: str | None = None
    constant_text: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Settings:
    """n_envs: rows of a batch, whether or not all are in use. max_steps: environment steps after which an episode
    has failed. n_action_steps: how many actions of each chunk are executed. image_size: side of camera images in
    pixels. cameras: the model's camera -> the suite's. unnorm_key: which of a checkpoint's statistics, None where it
    has one set. constant_text: text is padded to one length for all batches. threads: of torch, on the CPU.
    """

    n_envs: int
    max_steps: int
    n_action_steps: int
    image_size: int
    cameras: Mapping[str, str]
    unnorm_key: str | None
    constant_text: bool
    threads: int

    def __post_init__(self) -> None:
        for name in ("n_envs", "max_steps", "n_action_steps", "image_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_cameras(model: str, features: FeatureSpec, suite: Suite, given: Mapping[str, str] | None) -> dict[str, str]:
    """Which camera of the suite stands for which of the model; features: the processor's.

    given: the model's camera -> the suite's; None for those of the same name. A model that names no cameras sees all.
    Raises ValueError naming both sides where cameras are missing.
    """
    if given is not None:
        unknown = sorted(set(given.values()) - set(suite.cameras))
        if unknown:
            raise ValueError(f"the suite {suite.name!r} has no cameras {unknown}; it has {list(suite.cameras)}")
        chosen = dict(given)
    else:
        known = {lerobot.image_key(camera) for camera in features.cameras}
        keys = {camera: lerobot.image_key(camera) for camera in suite.cameras}
        chosen = {c: c for c, key in keys.items() if not known or features.rename.get(key, key) in known}
    fed = {features.rename.get(key, key) for key in map(lerobot.image_key, chosen)}
    missing = [c for c in features.cameras if lerobot.image_key(c) not in fed and not lerobot.is_empty_camera(c)]
    if len(missing) > features.empty_cameras or (features.cameras and not chosen):
        raise ValueError(
            f"the model {model!r} sees cameras {missing}, which the suite {suite.name!r} does not show; it shows "
            f"{list(suite.cameras)}: say which stands for which, as in cameras={{{missing[0]!r}: {suite.cameras[0]!r}}}"
        )
    return chosen


def native_image_size(spec: ModelSpec) -> int:
    """Side in pixels of square images that the model reads without enlarging or losing any."""
    size = spec.features.resize or getattr(getattr(spec, "vision", None), "image_size", None) or IMAGE_SIZE
    return size if isinstance(size, int) else max(size)


def check_action_width(model: str, width: int, suite: Suite) -> None:
    """Raises ValueError where the model's actions are not as wide as the suite's."""
    if width != suite.d_action:
        raise ValueError(
            f"the model {model!r} has actions of width {width}, but the environments of the suite {suite.name!r} "
            f"take {suite.d_action}"
        )


def settle(options: Options, name: str, model: HookedVLA | None, suite: Suite) -> Settings:
    """The options with everything decided; model None: a scripted expert acts, which looks at no images.

    Raises ValueError for numbers below 1, and as `choose_cameras`.
    """
    max_steps = suite.max_steps if options.max_steps is None else options.max_steps
    if model is None:
        return Settings(options.n_envs, max_steps, 1, 1, {}, None, options.constant_text, options.threads or 1)
    features = model.spec.features
    return Settings(
        n_envs=options.n_envs,
        max_steps=max_steps,
        n_action_steps=features.n_action_steps if options.n_action_steps is None else options.n_action_steps,
        image_size=native_image_size(model.spec) if options.image_size is None else options.image_size,
        cameras=choose_cameras(name, model.processor.features, suite, options.cameras),
        unnorm_key=options.unnorm_key,
        constant_text=options.constant_text,
        threads=_default_threads(model) if options.threads is None else options.threads,
    )


def _default_threads(model: HookedVLA) -> int:
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    return 1 if small else torch.get_num_threads()


class _Threads:
    @property
    def number(self) -> int:
        return torch.get_num_threads()

    @number.setter
    def number(self, n: int) -> None:
        torch.set_num_threads(n)


_threads = _Threads()


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """So many torch threads inside the block."""
    with kept(_threads, "number"):
        _threads.number = n
        yield


@contextmanager
def constant_text(processor: Processor, wanted: bool) -> Iterator[None]:
    """Inside the block, instructions are padded to the model's longest text where its tokenizer does the padding.

    A batch then has one shape, whatever its rows say, and rows round alike whatever shares their batch. Models whose
    processor lays out and pads prompts by itself are left alone: with instructions of different lengths, what shares
    a row's batch may then change the last bits of its actions.
    """
    tokenizer = getattr(processor, "tokenizer", None) if wanted else None
    if tokenizer is None:
        yield
        return
    with kept(tokenizer, "features"):
        tokenizer.features = replace(tokenizer.features, pad_text="max_length")
        yield
