"""Autoencoders of a policy's sites, trained on what it does in a suite or on a store, evaluated on other episodes.

The evaluation is kept beside each autoencoder, in evaluation.json.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from hooked_vla.folders import write_json
from hooked_vla.hooks.names import NamesFilter, resolve
from hooked_vla.registry import list_models
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


# under a minute on two cores, for a small policy: of tokens, and of means, of which a plan has one
QUICK = Amount(steps=120, batch_size=512, buffer_rows=16_384, evaluated=8192)
QUICK_MEANS = Amount(steps=40, batch_size=32, buffer_rows=1024, evaluated=256)
# what the command's own options say, and what the source does
_NOT_SETTINGS = ("model", "site", "d_model", "d_output", "training")
_INTEGERS_ARE_FLOATS = BeartypeConf(is_pep484_tower=True)


def quick_amount(name: str, changes: Mapping[str, Any]) -> Amount:
    """QUICK, or QUICK_MEANS for a preset whose rows are means. Raises ValueError for an unknown preset."""
    return QUICK if _wanted(name, "", changes).pooling == "token" else QUICK_MEANS


def train_on_policy(
    source: ModelSource, suite: str, sites: NamesFilter | Capture, name: str, amount: Amount, out: Path, seed: int,
    changes: Mapping[str, Any], options: Options, progress: bool,
) -> list[tuple[SparseAutoencoder, Evaluation]]:  # fmt: skip
    """Train autoencoders of the sites by a preset, on what the policy does in a suite as it acts.

    sites: or a `Capture` that also says which tokens and denoise steps count; rows are pooled as the preset has it.
    name: of the preset; changes: to it (`SAEConfig.changed`). Episode i starts from `seed + i`, those of the evaluation
    HELD_OUT later.
    Raises KeyError and ValueError for sites, presets and settings that there are not, and for an `out` that was begun
    with others.
    """
    model, wanted = source.load(), _wanted(name, source.name, changes)
    asked = sites if isinstance(sites, Capture) else Capture(sites)
    own = resolve(asked.sites, list(model.points))
    capture = replace(asked, sites=wanted.read(own), pooling=wanted.pooling)

    def rows(from_seed: int, buffer_rows: int) -> RolloutSource:
        return RolloutSource(
            model, suite, capture, from_seed, buffer_rows=buffer_rows,
            previous=wanted.architecture == "temporal", options=options,
        )  # fmt: skip

    with closing(rows(seed, amount.buffer_rows)) as training:
        configs = _configs(own, training, wanted, amount, seed)
        saes = train(training, configs, out, device=source.device, progress=progress, rows=training.about)
    with closing(rows(seed + HELD_OUT, min(amount.buffer_rows, QUICK.buffer_rows))) as held_out:
        return _evaluated(saes, held_out, amount.evaluated, out)


def train_on_store(
    store: TokenStore, sites: NamesFilter, name: str, model: str | None, amount: Amount, out: Path, seed: int,
    changes: Mapping[str, Any], device: str, progress: bool,
) -> list[tuple[SparseAutoencoder, Evaluation]]:  # fmt: skip
    """Train autoencoders of the sites by a preset on a store; every STORE_SHARE-th of its episodes is kept for the
    evaluation. model: whose activations they are; None where the store says it.

    Raises KeyError and ValueError as `train_on_policy`, and ValueError for a store of fewer than two episodes, of
    another model, of rows that are pooled otherwise than the preset's, or with a shard that was changed.
    """
    held_out = _held_out(store)
    training = [episode for episode in store.episodes if episode not in held_out]
    if not training:
        raise ValueError(f"{store.folder} has {len(held_out)} episode; one to train on and one to evaluate are needed")
    wanted = _wanted(name, _model_of(store, model), changes)
    _check_pooling(store, name, wanted.pooling)
    own, previous = resolve(sites, store.sites), wanted.architecture == "temporal"
    source = StoreSource(store, wanted.read(own), seed, where={"episode": training}, previous=previous)
    configs = _configs(own, source, wanted, amount, seed)
    store.verify(progress)
    saes = train(source, configs, out, device=device, progress=progress, rows={"store": store.sha256})
    return evaluate_on_store(store, saes, amount, out, seed)


def evaluate_on_store(
    store: TokenStore, saes: Sequence[SparseAutoencoder], amount: Amount, out: Path, seed: int
) -> list[tuple[SparseAutoencoder, Evaluation]]:
    """Evaluate autoencoders on the episodes of a store that `train_on_store` keeps for that, and write it beside each
    of them in out."""
    read = dict.fromkeys(site for sae in saes for site in (sae.config.site, sae.config.target))
    sites, previous = list(read), saes[0].config.architecture == "temporal"
    rows = StoreSource(store, sites, seed, passes=1, where={"episode": _held_out(store)}, previous=previous)
    return _evaluated(saes, rows, amount.evaluated, out)


def _held_out(store: TokenStore) -> list[int]:
    return list(store.episodes)[STORE_SHARE - 1 :: STORE_SHARE] or list(store.episodes)[-1:]


def _model_of(store: TokenStore, model: str | None) -> str:
    kept = store.about.get("model")
    if kept is None and model is None:
        raise ValueError(f"{store.folder} does not say whose activations it holds: name the model")
    if kept is not None and model is not None and is_another(kept, model):
        raise ValueError(f"{store.folder} holds activations of {kept!r}, not of {model!r}")
    return str(model or kept)


def is_another(kept: str, model: str) -> bool:
    """Whether two names are of different checkpoints, as far as names tell: a folder has many, and a model that was
    handed over as an object has that of its family."""
    if kept in list_models() or model in list_models():
        return False
    return kept != model and Path(kept).resolve() != Path(model).resolve()


def _check_pooling(store: TokenStore, name: str, pooling: str) -> None:
    kept = store.about.get("pooling", pooling)
    if kept != pooling:
        raise ValueError(
            f"{store.folder} keeps rows of pooling {kept!r}, but the preset {name!r} is of {pooling!r}: collect such "
            f"rows, or set pooling={kept}"
        )


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value"; values are JSON where they can be, else text.

    Raises ValueError for another form, unknown names, and values of another type than the setting's.
    """
    known = {name: hint for kind in (SAEConfig, Training) for name, hint in get_type_hints(kind).items()
             if name not in _NOT_SETTINGS}  # fmt: skip
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
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"unknown settings {unknown}; see SAEConfig and Training in hooked_vla/sae/config.py")
    for name, value in found.items():
        # true and false are integers to Python, and no numbers to a user
        wrong = isinstance(value, bool) and known[name] is not bool
        if wrong or not is_bearable(value, known[name], conf=_INTEGERS_ARE_FLOATS):
            hint = getattr(known[name], "__name__", "") if isinstance(known[name], type) else str(known[name])
            raise ValueError(f"{name} must be {hint}, got {value!r}")
    return found


@dataclass(frozen=True)
class _Wanted:
    """A preset and what is changed of it. pooling, architecture, output_site: what came of that."""

    preset: str
    model: str
    changes: Mapping[str, Any]
    pooling: str
    architecture: str
    output_site: str | None

    def read(self, sites: Sequence[str]) -> list[str]:
        """The sites whose rows are needed: those of the autoencoders, and what a transcoder predicts."""
        return list(dict.fromkeys([*sites, *([] if self.output_site is None else [self.output_site])]))

    def config(self, site: str, widths: Mapping[str, int], amount: Amount, seed: int) -> SAEConfig:
        changes, width = {"seed": seed, **self.changes}, widths[site]
        steps = changes.pop("steps", amount.steps)
        if self.output_site is not None:
            changes = {"d_output": widths[self.output_site], "subtract_decoder_bias": False, **changes}
        if amount.batch_size is not None:
            changes.setdefault("batch_size", amount.batch_size)
        if self.architecture in ("relu", "jumprelu", "gated"):
            changes.setdefault("k", None)
        if self.architecture == "matryoshka" and "prefixes" not in changes:
            own = preset(self.preset, self.model, site, width).n_features
            changes["prefixes"] = nested_prefixes(changes.get("n_features", own))
        return preset(self.preset, self.model, site, width, steps, **changes)


def _wanted(name: str, model: str, changes: Mapping[str, Any]) -> _Wanted:
    """Raises ValueError for an unknown preset."""
    own = preset(name, model, "", 1)
    found = {key: changes.get(key, getattr(own, key)) for key in ("pooling", "architecture", "output_site")}
    return _Wanted(name, model, changes, **found)


def _configs(sites: Sequence[str], source: Source, wanted: _Wanted, amount: Amount, seed: int) -> list[SAEConfig]:
    """One config a site, each with a seed of its own."""
    return [wanted.config(site, source.widths, amount, seed + i) for i, site in enumerate(sites)]


def _evaluated(
    saes: Sequence[SparseAutoencoder], rows: Source, n_rows: int, out: Path
) -> list[tuple[SparseAutoencoder, Evaluation]]:
    found = list(zip(saes, evaluate_all(saes, rows, n_rows), strict=True))
    for (_, evaluation), folder in zip(found, folder_names([sae.config for sae in saes]), strict=True):
        write_json(out / folder / EVALUATION, evaluation.to_json())
    return found
