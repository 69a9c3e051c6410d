"""The autoencoders that come with the package: one of the VLM and one of the expert of each shipped policy.

>>> train_zoo("smolvla-tabletop", Path("outputs/saes"))      # `hooked-vla sae zoo smolvla-tabletop --out outputs/saes`

OUT/smolvla-tabletop/<site>/{config.json,sae.safetensors,evaluation.json} is what `hooked_vla/zoo/saes` holds.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.training import Amount, evaluate_on_store, train_on_store
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.evaluate import Evaluation

# in the middle of each pathway, where what is read is not yet what is done
SITES = ("vlm.blocks.1.hook_resid_post", "expert.blocks.2.hook_resid_post")
SUITE = "goal"
# some 150,000 tokens of each site
EPISODES = 360
AMOUNT = Amount(steps=2000, batch_size=1024)
# halves the files; the evaluation is of the weights as they are in them
DTYPE = torch.float16


def train_zoo(
    name: str, out: Path, episodes: int = EPISODES, amount: Amount = AMOUNT, seed: int = 0, progress: bool = False
) -> Sequence[tuple[SparseAutoencoder, Evaluation]]:
    """Train a policy's autoencoders on what it does in SUITE, and write them into out/name; the activations, and what
    it goes on from after an interruption, lie in out/.name.

    Raises FileNotFoundError for a policy that there is not, ValueError for one without these sites.
    """
    source, work = ModelSource(name), out / f".{name}"
    model = source.load()
    sites = [site for site in SITES if site in model.points]
    if not sites:
        raise ValueError(f"{name} has none of the sites {list(SITES)}")
    store = collect(model, SUITE, sites, episodes, seed, work / "activations", name=name, progress=progress)
    trained = train_on_store(
        store, sites, "hooked", name, amount, work / "training", seed, {}, source.device, progress
    )  # fmt: skip
    for sae, _ in trained:
        sae.save_pretrained(out / name / sae.config.site, DTYPE)
    read = [SparseAutoencoder.from_pretrained(out / name / sae.config.site) for sae, _ in trained]
    return evaluate_on_store(store, read, amount, out / name, seed)
