"""The report of an experiment: Markdown that says what was asked, run and seen, and nothing that was not measured."""

import io
from collections.abc import Mapping
from math import isfinite
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.folders import write_file, write_json
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.outcome import Outcome
from hooked_vla.rollouts.experiments.publish import REPORT, RESULTS, VERDICTS

with needs_analysis_extra():
    import matplotlib.pyplot as plt
    import pandas as pd

_HOLDS = {True: "holds", False: "**does not hold**", None: "not judged"}
_MAX_ROWS = 60
_DPI = 130


def write_outcome(context: Context, outcome: Outcome) -> None:
    """results.parquet, tables/, figures/, verdicts.json and report.md, in this order.

    Raises ValueError for verdicts that are not those of the rules; nothing is then written.
    """
    outcome.check(context.definition.rules)
    write_file(context.out / RESULTS, outcome.main.to_parquet(index=False))
    for name, table in outcome.tables.items():
        write_file(context.out / "tables" / f"{name}.parquet", table.to_parquet(index=False))
    for name, (figure, _) in outcome.figures.items():
        sink = io.BytesIO()
        # without the version of matplotlib, the same figure gives the same bytes
        figure.savefig(sink, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
        write_file(context.out / "figures" / f"{name}.png", sink.getvalue())
        plt.close(figure)
    verdicts = {each.rule: {"holds": each.holds, "measured": each.measured} for each in outcome.verdicts}
    about = {"experiment": context.definition.id, "title": context.definition.title, "model": context.model_name,
             "quick": context.quick, "labels": list(outcome.labels), "verdicts": verdicts}  # fmt: skip
    write_json(context.out / VERDICTS, about)
    write_file(context.out / REPORT, report(context, outcome).encode())


def report(context: Context, outcome: Outcome) -> str:
    """The report as Markdown."""
    what = context.definition
    parts = [f"# {what.id}: {what.title} ({context.model_name})", what.question.strip()]
    if context.quick:
        parts.append("> A quick run: few episodes, to see that everything works. Its numbers decide nothing.")
    if outcome.labels:
        parts.append("\n".join(f"> **{label.strip()}**" for label in outcome.labels))
    parts += ["**Published.** " + " ".join(what.published.split()), "## Rules", _rules(context, outcome)]
    parts += ["## Results", _table(outcome.main, RESULTS)]
    for name, (_, caption) in outcome.figures.items():
        parts.append(f"![{caption}](figures/{name}.png)\n\n*{caption}*")
    for name, table in outcome.tables.items():
        parts += [f"### {name.replace('_', ' ').capitalize()}", _table(table, f"tables/{name}.parquet")]
    if outcome.notes:
        parts += ["## Limits", "\n".join(f"- {note}" for note in outcome.notes)]
    parts += ["## What was run", _settings(context)]
    return "\n\n".join(parts) + "\n"


def _rules(context: Context, outcome: Outcome) -> str:
    by_rule = {verdict.rule: verdict for verdict in outcome.verdicts}
    lines = ["| rule | measured | verdict |", "|---|---|---|"]
    for rule in context.definition.rules:
        verdict = by_rule[rule.id]
        lines.append(f"| {_cell(rule.text)} | {_cell(verdict.measured)} | {_HOLDS[verdict.holds]} |")
    return "\n".join(lines)


def _table(table: pd.DataFrame, path: str) -> str:
    """The first rows as Markdown; the whole is in the file at path."""
    head = [f"| {' | '.join(map(_cell, table.columns))} |", "|" + "---|" * len(table.columns)]
    rows = [f"| {' | '.join(_cell(value) for value in row)} |" for row in table.head(_MAX_ROWS).itertuples(index=False)]
    more = f"{len(table) - _MAX_ROWS} more rows in " if len(table) > _MAX_ROWS else ""
    return "\n".join(head + rows) + f"\n\n{more}`{path}`"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA:
        return ""
    if isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") == "f":
        number = float(value)
        return "" if number != number else f"{number:.3g}" if isfinite(number) else str(number)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _settings(context: Context) -> str:
    about = context.describe()
    model, versions = about["model"], about["versions"]
    lines = [
        f"- model `{context.model_name}`, weights {str(model.get('weights'))[:12]}",
        f"- first episode seed {context.seed}; starts and the policy's noise are the same under all arms",
        *(f"- {name} = {_shown(value)}" for name, value in about["settings"].items()),
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
    ]
    command = f"hooked-vla experiment run {context.definition.id} --model {context.model_name}"
    return "\n".join(lines) + f"\n\n`{command}{' --quick' if context.quick else ''} --seed {context.seed}`"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)
