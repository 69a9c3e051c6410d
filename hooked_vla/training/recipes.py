"""How each shipped model is made: one entry a model, all that differs between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hooked_vla.training.demonstrations import MIXTURE
from hooked_vla.training.objective import Readout
from hooked_vla.training.trainer import Schedule

# positions as large as those of the other towers: untrained ones of this kind are too small to be told from patches
_TOWERS = {"vision.dino.pos_embed": 50.0, "vision.siglip.pos_embed": 50.0}
# weights of one embodiment start at 0.02 as published, which suits a width of 1536; here, sums of 4 and of 96
_EMBODIMENT = {
    "expert.state_encoder.layer1.W": 25.0,
    "expert.state_encoder.layer2.W": 5.0,
    "expert.action_in_proj.W": 25.0,
    "expert.action_time_in.W": 4.0,
    "expert.action_time_out.W": 5.0,
    "expert.action_decoder.layer1.W": 5.0,
    "expert.action_decoder.layer2.W": 5.0,
}
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

    scaled: parameter -> factor on its random start; see RECIPES. tower_steps: batches of 64 images that its vision
    tower is pretrained on. moments: of demonstrations; retold: share of them that is labelled as another task of the
    same scene would be. suites: what is demonstrated, and how much of each. evaluated: suites in the model card.
    """

    spec: str
    schedule: Schedule
    readout: Readout | None
    words: tuple[str, ...] = ()
    scaled: Mapping[str, float] = field(default_factory=dict)
    tower_steps: int = 7000
    moments: int = 48_000
    retold: float = 0.0
    corrections: Corrections = Corrections(rounds=0, moments=8000, steps=1500)
    suites: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    evaluated: tuple[str, ...] = ("goal", "object", "spatial", "shift", "style")


RECIPES: dict[str, Recipe] = {
    "smolvla-tabletop": Recipe(
        "smolvla",
        Schedule(steps=6000, batch=64, n_draws=2, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_pre", 0.5),
        # the network multiplies image tokens by √128, which a pretrained connector knows
        scaled={"connector.proj.weight": 128**-0.5},
    ),
    "pi05-tabletop": Recipe(
        "pi05",
        Schedule(steps=4500, batch=64, n_draws=2, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_pre", 0.5),
        words=_STATE_WORDS,
        tower_steps=9000,
    ),
    "xvla-tabletop": Recipe(
        "xvla",
        Schedule(steps=2500, batch=64, n_draws=2, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_post", 0.5),
        tower_steps=5000,
    ),
    # no language: suites in which the scene says what to do
    "act-tabletop": Recipe(
        "act",
        Schedule(steps=6000, batch=64, n_draws=1, rate=6e-4),
        Readout("encoder.blocks.3.hook_resid_post", 0.5),
        tower_steps=4000,
        moments=24_000,
        suites={"object": 0.55, "spatial": 0.45},
        evaluated=("object", "spatial"),
    ),
    "groot-tabletop": Recipe(
        "groot_n15",
        Schedule(steps=2000, batch=64, n_draws=2, rate=6e-4),
        # the language model is causal, and images come first: image tokens see the instruction in the adapter
        Readout("adapter.blocks.1.hook_resid_post", 0.5),
        scaled=_EMBODIMENT,
        tower_steps=9000,
    ),
    "openvla-tabletop": Recipe(
        "openvla",
        Schedule(steps=6000, batch=64, n_draws=1, rate=6e-4),
        # causal too; cross-entropy is some 20 times as large as what other families minimise
        Readout("vlm.blocks.3.hook_resid_pre", 8.0, prompt_grid=4),
        scaled=_TOWERS,
        # one action a moment says little of where it leads: scenes were learned by heart, and the block not listened to
        retold=0.5,
        # and it acts at every step, from places that no demonstration came by
        corrections=Corrections(rounds=2, moments=8000, steps=2500),
    ),
    "oft-tabletop": Recipe(
        "openvla_oft",
        Schedule(steps=2000, batch=64, n_draws=1, rate=6e-4),
        Readout("vlm.blocks.3.hook_resid_pre", 0.5),
        scaled=_TOWERS,
    ),
}
