"""What autoencoders at every layer of the action expert cost a whole chunk, each model run as a captured graph."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from harness import Target
from tqdm import tqdm

from hooked_vla import HookedVLA, Observation, get_spec, registry
from hooked_vla.interventions import Edit, EditSet, SAEFeatureEdit
from hooked_vla.sae.splice import SpliceSAE

MODEL = "pi05"
# features for each channel, and how many of them are edited, as in the benchmark of the ops
EXPANSION, N_EDITED = 16, 16
ROUNDS, WARM_UP = 20, 3
# of the chunk's time
LIMIT = 0.03


def edits_of(model: HookedVLA, expansion: int = EXPANSION) -> list[Edit]:
    """16 features of an autoencoder of its own (a threshold's) at the end of every layer of the expert, ablated."""
    sites = [name for name in model.hook_points if name.startswith("expert.blocks.") and name.endswith("resid_post")]
    if not sites:
        raise ValueError(f"{model.spec.name} has no action expert with layers")
    found: list[Edit] = []
    for i, site in enumerate(sites):
        about, generator = model.hook_points[site], torch.Generator().manual_seed(i)
        d = about.shape[-1]
        assert isinstance(d, int)
        w_enc, w_dec = torch.randn(2, expansion * d, d, generator=generator).to(about.dtype) * d**-0.5
        sae = SpliceSAE(w_enc, torch.zeros(len(w_enc)), w_dec, torch.zeros(d), threshold=torch.ones(len(w_enc)))
        found.append(SAEFeatureEdit(site, sae, range(N_EDITED), scale=0.0))
    return found


def observation(model: HookedVLA) -> Observation:
    features = model.spec.features
    # a spec that leaves the cameras to the robot gets one
    images = dict.fromkeys(features.cameras or ("front",), np.zeros((224, 224, 3), np.uint8))
    return Observation(images, np.zeros(features.d_state, np.float32), "pick up the block")


def share(
    model: HookedVLA, edits: Sequence[Edit], rounds: int = ROUNDS, finish: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """(seconds of a chunk, the edits' share of it), compiled; in turns, the median over rounds.

    finish: waits for the device. Raises RuntimeError where the edits change no action, and so cost nothing.
    """
    inputs, edit_set = model.prepare(observation(model)), EditSet(model, edits)
    noise = torch.randn(1, *model.sample_actions(inputs).shape[1:], device=model.device)
    plain, edited = [], []
    before = after = noise

    def timed(times: list[float]) -> torch.Tensor:
        finish()
        start = time.perf_counter()
        actions = model.sample_actions(inputs, noise)
        finish()
        times.append(time.perf_counter() - start)
        return actions

    with torch.no_grad(), model.compile("exact"), tqdm(total=rounds + WARM_UP, desc="chunk", leave=False) as bar:
        for _ in range(rounds + WARM_UP):
            before = timed(plain)
            with model.edits(edit_set):
                after = timed(edited)
            bar.update()
    if torch.equal(before, after):
        raise RuntimeError("the edits change no action: their cost says nothing")
    ratios = [b / a for a, b in zip(plain[WARM_UP:], edited[WARM_UP:], strict=True)]
    return median(plain[WARM_UP:]), median(ratios) - 1


def chunk_target() -> Target:
    """Measured on the full-size model with random weights; needs a GPU."""
    spec = get_spec(MODEL)
    # bytes as tokens: the public tokenizer is not needed to know what a chunk costs
    spec = replace(spec, features=replace(spec.features, tokenizer="bytes"))
    model = HookedVLA.from_network(spec, registry.build_network(spec)).to(torch.bfloat16).to("cuda")
    model.requires_grad_(False)
    seconds, cost = share(model, edits_of(model), finish=torch.cuda.synchronize)
    label = f"SAE at every expert layer of {MODEL}, a chunk of {seconds * 1e3:.1f} ms"
    return Target(label, "delta_splice", "the chunk without", LIMIT, cost, cost <= LIMIT)
