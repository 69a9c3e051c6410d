"""The autoencoders that experiments use: those that come with the package, else trained on the run's own policy.

Training goes several times through what a policy does in some episodes, all of which is kept in the run's folder; every
tenth of them is held out, and what the autoencoders miss there stands in a table beside the results. Episodes for
training start HELD_OUT behind those of the run, so that nothing is judged on what it was fitted to.

recordings/activations/LABEL   the activations, see hooked_vla/sae/store.py
recordings/LABEL/<site>        the autoencoders that were trained
tables/autoencoders.parquet    one row for each (autoencoders_LABEL for other labels): see COLUMNS
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.injection_sites import choose_layers
from hooked_vla.interventions.reach import cut_set
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.training import HELD_OUT, STORE_SHARE, Amount, train_on_store
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.evaluate import Evaluation, evaluate_all
from hooked_vla.sae.files import shipped_saes
from hooked_vla.sae.rows import Capture
from hooked_vla.sae.store import TokenStore
from hooked_vla.sae.store_source import StoreSource

with needs_analysis_extra():
    import pandas as pd

LABEL = "saes"
PACKAGE, OWN = "package", "this run"
# pathways that a policy reads and acts with, in this order; their blocks' outputs are where autoencoders look
PATHWAYS = ("vlm", "encoder", "expert")
_MEASURED = ("rows", "explained_variance", "fvu", "cosine", "relative_length", "l0", "dead_share")
COLUMNS = (
    "site", "pooling", "origin", "architecture", "d_model", "features", "k", "steps", "episodes", *_MEASURED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SAESettings:
    """What the definition of an experiment says of its autoencoders; kinds' `Settings` have these beside their own.

    suite: where the policy acts. sites: whose autoencoders; none: see `sae_sites`. shipped: take those that come with
    the package where there are any. Of those that are trained, preset: see hooked_vla/sae/presets.py; train_episodes:
    that the policy acts for it, a tenth of which is held out; train_steps, train_batch: steps, and rows of each.
    """

    suite: str = "goal"
    sites: tuple[str, ...] = ()
    shipped: bool = True
    preset: str = "hooked"
    train_episodes: int = 240
    train_steps: int = 4000
    train_batch: int = 2048

    def __post_init__(self) -> None:
        """Raises ValueError for numbers below 1, and fewer than two episodes: one to train on, one to evaluate."""
        for name, least in (("train_episodes", 2), ("train_steps", 1), ("train_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def sae_sites(context: Context, settings: SAESettings) -> list[str]:
    """The sites whose autoencoders a run uses: those that are asked for; else those of which the package has
    autoencoders; else of each of PATHWAYS what the middle block hands on, among the blocks on which an action depends
    and that are not all that it depends on.

    Raises KeyError for a site that the model does not have, ValueError for a model without such blocks.
    """
    points = context.model.points
    if settings.sites:
        if missing := [site for site in settings.sites if site not in points]:
            raise KeyError(f"{context.model_name} has no sites {missing}")
        return list(settings.sites)
    if settings.shipped and (there := _shipped(context)):
        return [site for site in points if site in there]
    about, found = context.model.hook_points, []
    for pathway in PATHWAYS:
        blocks = [
            site for site in points
            if site.startswith(f"{pathway}.blocks.") and site.endswith(".hook_resid_post")
            and about[site].reaches_action and not cut_set(context.model, {site})
        ]  # fmt: skip
        found += [blocks[i] for i in choose_layers(list(range(len(blocks))), "middle")] if blocks else []
    if not found:
        raise ValueError(f"{context.model_name} has no blocks in {', '.join(PATHWAYS)}: say which sites")
    return found


def autoencoders(
    context: Context,
    sites: Sequence[str],
    settings: SAESettings,
    pooling: str = "token",
    label: str = LABEL,
    tasks: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    stored: str | None = None,
) -> tuple[list[SparseAutoencoder], pd.DataFrame]:
    """(autoencoders, table): an autoencoder of each site: the package's where `settings` allow it and there is one,
    else one that is trained on the run's policy. A resumed run finds them again.

    table: one row each, as in COLUMNS: what it is, where it comes from, and how well it does on held-out episodes
    (`Evaluation`). steps, episodes: of training; missing where the package does not say.

    pooling: what a row is, as in `SAEConfig`. label: tells several sets of one run apart. tasks: of the suite, to train
    on. changes: to the preset (`SAEConfig.changed`). The package's are only taken where both are None. stored: the
    label of another set whose activations are trained on, its own where None.
    Raises KeyError and ValueError as `train_on_store` and `collect`; ValueError where the label was used for others.
    """
    name = "autoencoders" if label == LABEL else f"autoencoders_{label}"

    def make() -> pd.DataFrame:
        return _make(context, list(sites), settings, pooling, label, tasks, changes, stored or label)

    table = context.table(name, make)
    if table["site"].tolist() != list(sites) or set(table["pooling"]) != {pooling}:
        raise ValueError(
            f"{context.out} has autoencoders {label!r} of {table['site'].tolist()}, asked for {list(sites)} "
            f"({pooling}): give them another label"
        )
    origins = dict(zip(table["site"], table["origin"], strict=True))
    folder = context.folder(label)
    saes = [
        SparseAutoencoder.from_pretrained(_name(context, site) if origins[site] == PACKAGE else folder / site)
        for site in sites
    ]
    return saes, table


def activations(
    context: Context,
    sites: Sequence[str],
    settings: SAESettings,
    episodes: int,
    label: str = LABEL,
    pooling: str = "token",
    tasks: Sequence[str] | None = None,
    seed: int | None = None,
) -> TokenStore:
    """What some sites hold while the policy acts, row by row with ids, kept in the run's folder.

    seed: of the first episode; None: HELD_OUT behind the run's. Raises as `collect`.
    """
    seed = context.seed + HELD_OUT if seed is None else seed
    out = context.folder("activations") / label
    return collect(
        context.model, settings.suite, Capture(list(sites), pooling), episodes, seed, out, tasks, context.options,
        context.model_name, progress=context.progress,
    )  # fmt: skip


def origin_notes(table: pd.DataFrame, settings: SAESettings) -> list[str]:
    """Where the autoencoders of a table of `autoencoders` come from, for a report."""
    notes = []
    for origin in (PACKAGE, OWN):
        sites = ", ".join(table[table["origin"] == origin]["site"])
        if sites and origin == PACKAGE:
            notes.append(f"The autoencoders of {sites} come with the package.")
        elif sites:
            notes.append(
                f"The autoencoders of {sites} were trained in this run, on {settings.train_episodes} episodes of the "
                f"policy of which every {STORE_SHARE}th was held out, for {settings.train_steps} steps of "
                f"{settings.train_batch} rows."
            )
    return notes


def _make(
    context: Context, sites: Sequence[str], settings: SAESettings, pooling: str, label: str,
    tasks: Sequence[str] | None, changes: Mapping[str, Any] | None, stored: str,
) -> pd.DataFrame:  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    there = _shipped(context) if settings.shipped and tasks is None is changes else {}
    shipped = [there[site] for site in sites if site in there and there[site].config.pooling == pooling]
    if shipped:
        # theirs were trained on episodes from other starts: all of these are held out
        own = [sae.config.site for sae in shipped]
        episodes = max(1, settings.train_episodes // STORE_SHARE)
        store = activations(context, own, settings, episodes, f"{label}_held_out", pooling)
        rows = StoreSource(store, own, context.seed, passes=1)
        for sae, figures in zip(shipped, evaluate_all(shipped, rows, Amount().evaluated), strict=True):
            found[sae.config.site] = _row(sae, PACKAGE, figures)
    if missing := [site for site in sites if site not in found]:
        store = activations(context, missing, settings, settings.train_episodes, stored, pooling, tasks)
        amount = Amount(settings.train_steps, settings.train_batch)
        for sae, figures in train_on_store(
            store, missing, settings.preset, context.model_name, amount, context.folder(label), context.seed,
            {**(changes or {}), "pooling": pooling}, context.source.device, context.progress,
        ):  # fmt: skip
            found[sae.config.site] = _row(sae, OWN, figures) | {"episodes": settings.train_episodes}
    table = pd.DataFrame([found[site] for site in sites], columns=list(COLUMNS))
    return table.astype({"k": "Int64", "steps": "Int64", "episodes": "Int64"})


def _row(sae: SparseAutoencoder, origin: str, figures: Evaluation) -> dict[str, Any]:
    config = sae.config
    steps = None if config.training is None else config.training.steps
    return {
        "site": config.site, "pooling": config.pooling, "origin": origin, "architecture": config.architecture,
        "d_model": config.d_model, "features": config.n_features, "k": config.k, "steps": steps, "episodes": None,
        **{name: getattr(figures, name) for name in _MEASURED},
    }  # fmt: skip


def _name(context: Context, site: str) -> str:
    return f"{context.model_name}/{site}"


def _shipped(context: Context) -> Mapping[str, SparseAutoencoder]:
    """The package's autoencoders of the run's model, by site."""
    prefix = f"{context.model_name}/"
    names = [name for name in shipped_saes() if name.startswith(prefix)]
    return {name.removeprefix(prefix): SparseAutoencoder.from_pretrained(name) for name in names}
