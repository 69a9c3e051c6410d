"""What an experiment came to: tables, figures, and a verdict on every rule of its definition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.definition import Rule

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Verdict:
    """Whether a rule holds. holds: None where it could not be judged, and measured then says why; else measured says
    what was seen, with the numbers that decided."""

    rule: str
    holds: bool | None
    measured: str


@dataclass(frozen=True)
class Outcome:
    """main: the table that the report shows first, one row a cell. tables: others, by name. figures: by name, each with
    its caption. labels: what a reader must know before the numbers ("replay: ..."). notes: what was not measured, and
    what limits the conclusions."""

    main: pd.DataFrame
    verdicts: Sequence[Verdict]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()

    def check(self, rules: Sequence[Rule]) -> None:
        """Raises ValueError unless every rule has exactly one verdict, and every verdict is on a rule."""
        judged, known = [verdict.rule for verdict in self.verdicts], [rule.id for rule in rules]
        if sorted(judged) != sorted(known):
            raise ValueError(f"verdicts are on {sorted(judged)}, but the rules are {sorted(known)}")
