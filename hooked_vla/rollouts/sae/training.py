"""Autoencoders of a policy's sites, trained on what it does in a suite or on a store, evaluated on other episodes.

The evaluation is kept beside each autoencoder, in evaluation.json.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hooked_vla.folders import write_json
from hooked_vla.hooks.names import NamesFilter, resolve
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.sae.collect import RolloutSource
from hooked_vla.rollouts.settings import Options
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.buffer import CAPACITY
from hooked_vla.sae.config import SAEConfig, Training
from hooked_vla.sae.evaluate import Evaluation, evaluate_all
from hooked_vla.sae.presets import nested_prefixes, preset
from hooked_vla.sae.rows import Capture
from hooked_vla.sae.run_folder import folder_names
from hooked_vla.sae.source import Source
from hooked_vla.sae.store import TokenStore
from hooked_vla.sae.store_source import StoreSource
from hooked_vla.sae.trainer import train

EVALUATION = "evaluation.json"
# episodes of the evaluation start so far behind those of training
HELD_OUT = 1_000_000
# of a store, every so many-th episode is held out
STORE_SHARE = 10


@dataclass(frozen=True)
class Amount:
    """How much is done: steps (None for the preset's), rows a step (None for the preset's), rows that are mixed, and
    rows of the evaluation."""

    steps: int | None = None
    batch_size: int | None = None
    buffer_rows: int = CAPACITY
    evaluated: int = 65_536


# under a minute on two cores, for a small policy
QUICK = Amount(steps=120, batch_size=512, buffer_rows=16_384, evaluated=8192)


def train_on_policy(
    source: ModelSource, suite: str, sites: NamesFilter, name: str, amount: Amount, out: Path, seed: int,
    changes: Mapping[str, Any], options: Options, progress: bool,
) -> list[tuple[SparseAutoencoder, Evaluation]]:  # fmt: skip
    """Train autoencoders of the sites by a preset, on what the policy does in a suite as it acts.

    name: of the preset; changes: to it (`SAEConfig.changed`). Episode i starts from `seed + i`, those of the evaluation
    HELD_OUT later.
    Raises KeyError and ValueError for sites, presets and settings that there are not.
    """
    model, wanted = source.load(), _wanted(name, source.name, changes)

    def rows(from_seed: int, buffer_rows: int) -> RolloutSource:
        return RolloutSource(
            model, suite, Capture(sites, wanted.pooling), from_seed, buffer_rows=buffer_rows,
            previous=wanted.architecture == "temporal", options=options,
        )  # fmt: skip

    with closing(rows(seed, amount.buffer_rows)) as training:
        configs = _configs(resolve(sites, list(model.points)), training, wanted, amount, seed)
        saes = train(training, configs, out, device=source.device, progress=progress)
    with closing(rows(seed + HELD_OUT, min(amount.buffer_rows, QUICK.buffer_rows))) as held_out:
        return _evaluated(saes, held_out, amount.evaluated, out)


def train_on_store(
    store: TokenStore, sites: NamesFilter, name: str, model: str, amount: Amount, out: Path, seed: int,
    changes: Mapping[str, Any], device: str, progress: bool,
) -> list[tuple[SparseAutoencoder, Evaluation]]:  # fmt: skip
    """Train autoencoders of the sites by a preset on a store; every STORE_SHARE-th of its episodes is kept for the
    evaluation. model: whose activations they are.

    Raises KeyError and ValueError as `train_on_policy`, and ValueError for a store of fewer than two episodes.
    """
    held_out = _held_out(store)
    training = [episode for episode in store.episodes if episode not in held_out]
    if not training:
        raise ValueError(f"{store.folder} has {len(held_out)} episode; one to train on and one to evaluate are needed")
    wanted = _wanted(name, model, changes)
    source = StoreSource(store, sites, seed, where={"episode": training}, previous=wanted.architecture == "temporal")
    configs = _configs(resolve(sites, store.sites), source, wanted, amount, seed)
    saes = train(source, configs, out, device=device, progress=progress)
    return evaluate_on_store(store, saes, amount, out, seed)


def evaluate_on_store(
    store: TokenStore, saes: Sequence[SparseAutoencoder], amount: Amount, out: Path, seed: int
) -> list[tuple[SparseAutoencoder, Evaluation]]:
    """Evaluate autoencoders on the episodes of a store that `train_on_store` keeps for that, and write it beside each
    of them in out."""
    sites, previous = [sae.config.site for sae in saes], saes[0].config.architecture == "temporal"
    rows = StoreSource(store, sites, seed, passes=1, where={"episode": _held_out(store)}, previous=previous)
    return _evaluated(saes, rows, amount.evaluated, out)


def _held_out(store: TokenStore) -> list[int]:
    return list(store.episodes)[STORE_SHARE - 1 :: STORE_SHARE] or list(store.episodes)[-1:]


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value"; values are JSON where they can be, else text. Raises ValueError for another form."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"a change is written name=value, got {text!r}")
        try:
            made = json.loads(value)
        except json.JSONDecodeError:
            made = value
        found[name] = tuple(made) if isinstance(made, list) else made
    if unknown := sorted(set(found) - {field.name for kind in (SAEConfig, Training) for field in fields(kind)}):
        raise ValueError(f"unknown settings {unknown}; see SAEConfig and Training in hooked_vla/sae/config.py")
    return found


@dataclass(frozen=True)
class _Wanted:
    """A preset and what is changed of it. pooling, architecture: what came of that."""

    preset: str
    model: str
    changes: Mapping[str, Any]
    pooling: str
    architecture: str

    def config(self, site: str, width: int, amount: Amount, seed: int) -> SAEConfig:
        changes = {"seed": seed, **self.changes}
        if amount.batch_size is not None:
            changes.setdefault("batch_size", amount.batch_size)
        if self.architecture in ("relu", "jumprelu", "gated"):
            changes.setdefault("k", None)
        if self.architecture == "matryoshka" and "prefixes" not in changes:
            own = preset(self.preset, self.model, site, width).n_features
            changes["prefixes"] = nested_prefixes(changes.get("n_features", own))
        return preset(self.preset, self.model, site, width, amount.steps, **changes)


def _wanted(name: str, model: str, changes: Mapping[str, Any]) -> _Wanted:
    """Raises ValueError for an unknown preset."""
    own = preset(name, model, "", 1)
    found = {key: changes.get(key, getattr(own, key)) for key in ("pooling", "architecture")}
    return _Wanted(name, model, changes, **found)


def _configs(sites: Sequence[str], source: Source, wanted: _Wanted, amount: Amount, seed: int) -> list[SAEConfig]:
    """One config a site, each with a seed of its own."""
    return [wanted.config(site, source.widths[site], amount, seed + i) for i, site in enumerate(sites)]


def _evaluated(
    saes: Sequence[SparseAutoencoder], rows: Source, n_rows: int, out: Path
) -> list[tuple[SparseAutoencoder, Evaluation]]:
    found = list(zip(saes, evaluate_all(saes, rows, n_rows), strict=True))
    for (_, evaluation), folder in zip(found, folder_names([sae.config for sae in saes]), strict=True):
        write_json(out / folder / EVALUATION, evaluation.to_json())
    return found
