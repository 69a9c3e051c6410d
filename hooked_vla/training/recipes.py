"""How each shipped model is made: one entry a model, all that differs between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hooked_vla.training.demonstrations import MIXTURE
from hooked_vla.training.objective import Readout
from hooked_vla.training.trainer import Schedule

# words of prompts that are not said to people
_STATE_WORDS = ("task", "state", "action", ":", ",", ";", "-", *map(str, range(256)))


@dataclass(frozen=True)
class Corrections:
    """DAgger: in each of `rounds`, the policy acts until there are `moments` more, and trains on for `steps`."""

    rounds: int
    moments: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """spec: name of the model whose "tabletop" size is trained. words: of its tokenizer beside the tabletop's.

    tower_steps: batches of 64 images that its vision tower is pretrained on. moments: of demonstrations. suites: what
    is demonstrated, and how much of each. evaluated: suites in the model card.
    """

    spec: str
    schedule: Schedule
    readout: Readout | None
    words: tuple[str, ...] = ()
    tower_steps: int = 7000
    moments: int = 48_000
    corrections: Corrections = Corrections(rounds=0, moments=8000, steps=1500)
    suites: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    evaluated: tuple[str, ...] = ("goal", "object", "spatial", "shift", "style")


RECIPES: dict[str, Recipe] = {
    "smolvla-tabletop": Recipe(
        "smolvla",
        Schedule(steps=6000, batch=64, n_draws=2, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_pre", 0.5),
    ),
    "pi05-tabletop": Recipe(
        "pi05",
        Schedule(steps=4500, batch=64, n_draws=2, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_pre", 0.5),
        words=_STATE_WORDS,
        tower_steps=9000,
    ),
}
