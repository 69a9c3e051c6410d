"""Runs an experiment from its definition to its report."""

from pathlib import Path

from hooked_vla.rollouts import UNSEEN
from hooked_vla.rollouts.executor import Executor, LocalExecutor
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import Definition, find_experiment
from hooked_vla.rollouts.experiments.outcome import Outcome
from hooked_vla.rollouts.experiments.report import write_outcome
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options


def run_experiment(
    experiment: Definition | str | Path,
    out: str | Path,
    model: ModelSource | str | None = None,
    quick: bool = False,
    seed: int = UNSEEN,
    executor: Executor | None = None,
    options: Options | None = None,
    progress: bool = False,
) -> Outcome:
    """Run an experiment and write what came of it into `out`; the same call goes on where it was interrupted.

    experiment: a definition, the id of one of the library's, or a TOML file. model: what `HookedVLA.from_pretrained`
    takes, or where to get one; None: the first of the definition's. quick: the definition's quick settings.
    seed: of the first episode. executor: where rollouts run, this process where None. options: of all rollouts.
    Raises FileNotFoundError for an unknown experiment, ValueError for a definition that cannot be read, a folder that
    holds another run, and whatever the kind finds wrong with the model.
    """
    definition = experiment if isinstance(experiment, Definition) else find_experiment(experiment)
    source = model if isinstance(model, ModelSource) else ModelSource(model or definition.models[0])
    context = Context(
        definition, source, Path(out), quick, seed,
        LocalExecutor() if executor is None else executor, Options() if options is None else options, progress,
    )  # fmt: skip
    context.claim()
    outcome: Outcome = definition.module.run(context, definition.settle(quick))
    write_outcome(context, outcome)
    return outcome
