"""Which features are ablated, and how much of a token that takes away.

Three orders of the same autoencoder's features: those that tell concepts, by their score; the most frequent; random
ones of all that are ever active. And for each concept its own features, beside as many that are about as frequent and
do not tell it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions import EditArm, SAEFeatureEdit
from hooked_vla.rollouts.experiments.kinds.battery_runs import ALPHA, records
from hooked_vla.rollouts.sae.feature_index import FeatureIndex
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.splice import SpliceSAE
from hooked_vla.sae.store import TokenStore

with needs_analysis_extra():
    import pandas as pd

TARGETED, FREQUENT, RANDOM, ALL, SHAM = "targeted", "frequent", "random", "all", "sham"
CONCEPT, MATCHED = "concept", "matched"
# rows of the store on which the size of an ablation is measured, spread evenly
_ROWS = 4096


@dataclass(frozen=True)
class Ablation:
    """An arm and what it is: kind, one of the words above; set: which draw or concept, "" where there is one; features:
    that are set to 0 (the sham leaves them as they are)."""

    arm: EditArm
    site: str
    kind: str
    set: str
    features: tuple[int, ...]


def short(site: str) -> str:
    """A residual site without the words that all have."""
    return site.removesuffix(".hook_resid_post").replace(".blocks.", " ")


def confirmed(concepts: pd.DataFrame) -> pd.DataFrame:
    """The rows of an index's table of concepts whose label is told within tasks on held-out seeds, not by chance; best
    first."""
    rows = [
        row for row in records(concepts)
        if row["is_confirmed"] and not row["is_confounded"] and row["p_value"] <= ALPHA
    ]  # fmt: skip
    return pd.DataFrame(sorted(rows, key=lambda row: (-row["score"], row["feature"])), columns=list(concepts.columns))


def orders(index: FeatureIndex, n_random: int, seed: int) -> dict[tuple[str, str], list[int]]:
    """Features in the order in which they are ablated, by kind and set."""
    frequent, alive = index.ranking()
    told = confirmed(index.sql("SELECT * FROM concepts"))["feature"].tolist()
    found = {(TARGETED, ""): list(dict.fromkeys(told)), (FREQUENT, ""): frequent}
    for draw in range(n_random):
        found[RANDOM, str(draw)] = np.random.default_rng((seed, draw)).permutation(sorted(alive)).tolist()
    return found


def titration(
    sae: SparseAutoencoder, found: Mapping[tuple[str, str], Sequence[int]], counts: Sequence[int]
) -> list[Ablation]:
    """The first n features of every order set to 0, for every n of counts that it has, and all that are ever active;
    and a sham: the most frequent ones through the same edit, left as they are."""
    site, spliced, made = sae.config.site, sae.splice(), []
    for (kind, name), order in found.items():
        for n in sorted(set(counts)):
            if n <= len(order):
                made.append(_ablation(sae, spliced, kind, name, order[:n], f"{kind} {name} {n}".replace("  ", " ")))
    made.append(_ablation(sae, spliced, ALL, "", found[FREQUENT, ""], ALL))
    frequent = tuple(found[FREQUENT, ""][: max(counts)])
    sham = EditArm(f"{short(site)}: {SHAM}", [SAEFeatureEdit(site, spliced, frequent, scale=1.0)])
    return [*made, Ablation(sham, site, SHAM, "", frequent)]


def concept_ablations(
    sae: SparseAutoencoder, index: FeatureIndex, n_features: int, n_concepts: int, seed: int
) -> list[Ablation]:
    """For each of the best told concepts its features set to 0, and as many that do not tell it, each about as
    frequent as one of them."""
    concepts = index.sql("SELECT * FROM concepts")
    density = dict(index.sql("SELECT feature, density FROM features WHERE density > 0").itertuples(index=False))
    spliced, made = sae.splice(), []
    told, chosen_for = _by_concept(confirmed(concepts)), _by_concept(concepts)
    for concept, features in list(told.items())[:n_concepts]:
        own = features[:n_features]
        others = matched(own, density, set(chosen_for[concept]), seed)
        if len(others) < len(own):
            # a small dictionary has nothing to match them with
            continue
        for name, each in ((CONCEPT, own), (MATCHED, others)):
            made.append(_ablation(sae, spliced, name, concept, each, f"{name} {concept}"))
    return made


def _by_concept(concepts: pd.DataFrame) -> dict[str, list[int]]:
    """Features by "kind=value", in the table's order."""
    found: dict[str, list[int]] = {}
    for row in records(concepts):
        found.setdefault(f"{row['kind']}={row['value']}", []).append(int(row["feature"]))
    return found


def matched(own: Sequence[int], density: Mapping[int, float], not_these: set[int], seed: int) -> list[int]:
    """For each feature another one, at random among the five nearest to it in density that are not taken; fewer where
    there are no more."""
    rng, found = np.random.default_rng(seed), []
    free = [each for each in sorted(density) if each not in not_these and each not in own]
    for feature in own:
        near = sorted(free, key=lambda each: (abs(density[each] - density[feature]), each))[:5]
        if near:
            found.append(near[int(rng.integers(len(near)))])
            free.remove(found[-1])
    return found


def _ablation(
    sae: SparseAutoencoder, spliced: SpliceSAE, kind: str, name: str, features: Sequence[int], said: str
) -> Ablation:
    site, listed = sae.config.site, tuple(int(each) for each in features)
    edit = SAEFeatureEdit(site, spliced, listed, scale=0.0)
    return Ablation(EditArm(f"{short(site)}: {said}", [edit]), site, kind, name, listed)


@torch.no_grad()
def taken_away(
    sae: SparseAutoencoder, store: TokenStore, sets: Sequence[Sequence[int]]
) -> Float[np.ndarray, " set"]:  # fmt: skip
    """How much of a token each set of features is: mean length of what ablating it takes away, over the token's."""
    n = store.n_rows(sae.config.site)
    x = store.read(sae.config.site, torch.arange(0, n, max(1, n // _ROWS))).float()
    features, w_dec, length = sae.encode(x), sae.splice().w_dec, x.norm(dim=1).clamp_min(1e-12)
    return np.array([
        float(((features[:, list(each)] @ w_dec[list(each)]).norm(dim=1) / length).mean()) for each in sets
    ])  # fmt: skip
