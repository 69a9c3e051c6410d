"""Keeps what a run came to without what it was made from: report, tables, figures and verdicts, but no episodes."""

import json
import shutil
from pathlib import Path
from typing import Any

from hooked_vla.folders import new_folder
from hooked_vla.rollouts.experiments.context import EXPERIMENT

VERDICTS, REPORT, RESULTS = "verdicts.json", "report.md", "results.parquet"
_KEPT = (EXPERIMENT, REPORT, RESULTS, VERDICTS, "figures", "tables")


def publish(run: str | Path, to: str | Path) -> Path:
    """Copy a finished run's results to TO/EXPERIMENT/MODEL, which takes the place of what was there.

    Raises FileNotFoundError for a folder that is not a finished run, ValueError for a quick one.
    """
    run = Path(run)
    if missing := [name for name in (EXPERIMENT, REPORT, RESULTS, VERDICTS) if not (run / name).is_file()]:
        raise FileNotFoundError(f"{run} is not a finished run of an experiment: it has no {', '.join(missing)}")
    about = json.loads((run / VERDICTS).read_text())
    if about["quick"]:
        raise ValueError(f"{run} is a quick run: its numbers decide nothing")
    target = Path(to) / about["experiment"] / Path(about["model"]).name
    with new_folder(target) as temporary:
        for name in _KEPT:
            source = run / name
            if source.is_dir():
                shutil.copytree(source, temporary / name)
            elif source.is_file():
                shutil.copyfile(source, temporary / name)
    return target


def read_verdicts(folder: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The verdicts.json of every published run, by experiment and model."""
    files = sorted(Path(folder).glob(f"*/*/{VERDICTS}"))
    return {(file.parent.parent.name, file.parent.name): json.loads(file.read_text()) for file in files}
