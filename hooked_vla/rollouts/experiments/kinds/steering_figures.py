"""Figures of steering: shift and success over the dose, what is left of the instruction, and phases."""

from collections.abc import Sequence

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import curve, heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.steering_features import AXES, Choice

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


def steering_figures(
    table: pd.DataFrame, told: pd.DataFrame, phases: pd.DataFrame | None, choices: Sequence[Choice]
) -> dict[str, tuple[Figure, str]]:
    """Three figures a site, and one of its phases where there are any."""
    found: dict[str, tuple[Figure, str]] = {}
    apart = {row["arm"]: row for row in records(told)}
    for number, choice in enumerate(choices):
        title = f"{choice.site}, feature {choice.feature}"
        doses = _doses(table, choice.site)
        axis = AXES[choice.axis]
        found[f"shift_{number}"] = (
            curve(doses, "rho", "shift", "direction", "shift_low", "shift_high", title, "dose ρ, lengths of the token",
                  f"shift along {axis}, metres"),
            f"How far the end effector goes along {axis} beside its unedited episode, over the dose, at "
            f"{choice.site}; bands are 95 % intervals by tasks.",
        )  # fmt: skip
        found[f"success_{number}"] = (
            curve(doses, "rho", "success", "direction", "success_low", "success_high", title,
                  "dose ρ, lengths of the token", "success, 95 % interval"),
            f"Success over the dose at {choice.site}.",
        )  # fmt: skip
        rows = [{**row, **apart[row["arm"]]} for row in records(doses)]
        found[f"instructions_{number}"] = (
            curve(pd.DataFrame(rows), "rho", "apart", "direction", "low", "high", title,
                  "dose ρ, lengths of the token", "left of the instruction"),
            f"First chunks at {choice.site}: mean distance between those of different instructions as a share of what "
            "it is unedited; 0 is an overwrite.",
        )  # fmt: skip
        if phases is not None:
            part = pd.DataFrame([row for row in records(phases) if row["site"] == choice.site])
            found[f"phases_{number}"] = (
                heat_map(part, "phase", "rho", "shift", title, f"shift along {axis}, metres", 0.0, form=".2g"),
                f"Shift along {axis} where the feature is added in plans made in one phase only, at {choice.site}.",
            )
    return found


def _doses(table: pd.DataFrame, site: str) -> pd.DataFrame:
    """Rows of a site by direction and dose; the sham is every direction's dose 0."""
    rows = [row for row in records(table) if row["site"] == site and row["rho"] == row["rho"]]
    [sham] = [row for row in rows if row["rho"] == 0]
    directions = list(dict.fromkeys(row["direction"] for row in rows if row["rho"] != 0))
    shams = [{**sham, "direction": direction} for direction in directions]
    by = {direction: i for i, direction in enumerate(directions)}
    doses = [row for row in rows if row["rho"] != 0]
    return pd.DataFrame(sorted([*doses, *shams], key=lambda row: (by[row["direction"]], row["rho"])))
