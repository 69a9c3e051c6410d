"""Success of two policies over the variance that is left of their activations."""

from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import curve
from hooked_vla.rollouts.experiments.kinds.battery_runs import records

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


def heads_figures(table: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """One figure a kind of arm: success, and displacement, over explained variance."""
    found: dict[str, tuple[Figure, str]] = {}
    for kind in dict.fromkeys(row["kind"] for row in records(table) if row["kind"]):
        part = _with_baseline(table, kind)
        found[f"success_{kind}"] = (
            curve(part, "explained_variance", "success", "model", "success_low", "success_high",
                  f"Success under {kind}", "variance that is left", "success, 95 % interval"),
            f"Success under {kind} over the variance that it leaves, in both models, each with its own unedited "
            "success at the right.",
        )  # fmt: skip
        found[f"displacement_{kind}"] = (
            curve(part, "explained_variance", "displacement", "model", "displacement_low", "displacement_high",
                  f"Displacement under {kind}", "variance that is left", "metres"),
            f"How far {kind} leads the end effector from the model's own unedited episode, metres.",
        )  # fmt: skip
    return found


def _with_baseline(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The arms of a kind and the unedited policies, which explain all."""
    rows: list[dict[str, Any]] = []
    for row in records(table):
        if row["kind"] == kind:
            rows.append(row)
        elif row["arm"] == "baseline":
            rows.append({**row, "explained_variance": 1.0})
    return pd.DataFrame(rows)
