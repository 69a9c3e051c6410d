"""What `hooked-vla sae` prints: tables of arms, features and stores."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import pandas as pd

    from hooked_vla.rollouts.sae.feature_index import FeatureIndex
    from hooked_vla.rollouts.sae.hooked_sr import HookedSR
    from hooked_vla.sae.store import TokenStore


def print_loop(found: "HookedSR") -> None:
    from rich.console import Console
    from rich.table import Table

    base = found.baseline
    title = f"unedited: {base.success_rate:.1%} of {base.episodes}" + (
        "" if found.is_above_gate else " (too few to tell a loss)"
    )
    table = Table("arm", "success", "95 % interval", "of unedited", "p (Holm)", "expl. variance", "FVU", title=title)
    for name, arm in found.arms.items():
        low, high = arm.rate.interval
        ratio, p = ("" if arm.ratio is None else f"{arm.ratio:.3f}"), arm.p_holm
        table.add_row(
            name, f"{arm.rate.success_rate:.1%}", f"{low:.1%} to {high:.1%}", ratio, "" if p != p else f"{p:.3g}",
            f"{arm.fidelity.explained_variance:.3f}", f"{arm.fidelity.fvu:.3f}",
        )  # fmt: skip
    Console().print(table)


_SHOWN = ("feature", "score", "density", "frames", "coverage", "general", "general_null", "description")


def show_feature(found: "FeatureIndex", feature: int, n: int, as_json: bool) -> None:
    """All that an index has of one feature."""
    import json

    head = found.feature(feature)
    tables = {
        "frames": found.top_frames(feature, n), "episodes": found.top_episodes(feature, n),
        "labels": found.shares(feature), "concepts": found.concepts(feature),
        "decoder neighbours": found.neighbours(feature), "coactive": found.neighbours(feature, "coactive"),
    }  # fmt: skip
    if as_json:
        # JSON has no NaN
        plain = {name: None if value != value else value for name, value in head.items()}
        body = {name: json.loads(str(table.to_json(orient="records"))) for name, table in tables.items()}
        typer.echo(json.dumps({**plain, **body}))
        return
    typer.echo(f"feature {feature} of {found.site}: {head['description']}")
    for name, table in tables.items():
        print_frame(name, table)


def print_features(found: "FeatureIndex", table: "pd.DataFrame") -> None:
    print_frame(f"features of {found.site}", table.filter([name for name in _SHOWN if name in table]))


def print_frame(title: str, frame: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(str, frame.columns), title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{each:.3g}" if isinstance(each, float) else escape(str(each)) for each in row))
    Console().print(table)


def print_store(store: "TokenStore") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "rows", "width", "dtype", title=f"{len(store.episodes)} episodes in {store.folder}")
    for name in store.sites:
        table.add_row(name, f"{store.n_rows(name):,}", str(store.widths[name]), str(store.dtype(name))[6:])
    Console().print(table)
