"""Which modules the API reference has, and where their sources are; imports nothing of the package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# import name -> folder, where it is not the folder of that name (pyproject: package-dir)
MAPPED = {"hooked_vla.kernels": "kernels/ops", "hooked_vla.model_specs": "model_specs"}

GROUPS = {
    "Models": (
        "hooked_vla.vla", "hooked_vla.hooks.model", "hooked_vla.inputs", "hooked_vla.registry", "hooked_vla.policy",
        "hooked_vla.weights", "hooked_vla.spec.base", "hooked_vla.models.network",
    ),
    "Hooks": (
        "hooked_vla.hooks.sites", "hooked_vla.hooks.cache", "hooked_vla.hooks.point", "hooked_vla.hooks.names",
    ),
    "Interventions": (
        "hooked_vla.interventions.edits", "hooked_vla.interventions.sae_edits", "hooked_vla.interventions.edit_set",
        "hooked_vla.interventions.files", "hooked_vla.interventions.arm", "hooked_vla.interventions.injection",
        "hooked_vla.interventions.reach", "hooked_vla.interventions.compiled",
    ),
    "Analysis": (
        "hooked_vla.analysis.patching", "hooked_vla.analysis.path_patching", "hooked_vla.analysis.attribution",
        "hooked_vla.analysis.metrics", "hooked_vla.analysis.subspaces", "hooked_vla.analysis.das",
        "hooked_vla.analysis.probes", "hooked_vla.analysis.attention", "hooked_vla.analysis.ablation",
        "hooked_vla.analysis.direct", "hooked_vla.analysis.lens", "hooked_vla.analysis.neurons",
        "hooked_vla.analysis.statistics",
    ),
    "Sparse autoencoders": (
        "hooked_vla.sae.autoencoder", "hooked_vla.sae.config", "hooked_vla.sae.presets", "hooked_vla.sae.trainer",
        "hooked_vla.sae.source", "hooked_vla.sae.evaluate", "hooked_vla.sae.splice", "hooked_vla.sae.saelens",
    ),
    "Acting": (
        "hooked_vla.rollouts.sweep", "hooked_vla.rollouts.arms", "hooked_vla.rollouts.settings",
        "hooked_vla.rollouts.suites", "hooked_vla.rollouts.tabletop.env", "hooked_vla.rollouts.replay",
    ),
    "Kernels": (
        "hooked_vla.kernels.dispatch", "hooked_vla.kernels.delta_splice", "hooked_vla.kernels.sae_splice",
        "hooked_vla.kernels.segment_mean_delta", "hooked_vla.kernels.lowrank_edit",
        "hooked_vla.kernels.sae_encode_topk", "hooked_vla.kernels.sparse_decode", "hooked_vla.kernels.rank_count",
        "hooked_vla.kernels.sparse_backward",
    ),
}  # fmt: skip


def source(module: str) -> str:
    """The file of a module, from the root of the repository.

    Raises FileNotFoundError naming a module that has none.
    """
    base = next((name for name in MAPPED if f"{module}.".startswith(f"{name}.")), "")
    path = f"{MAPPED[base]}{module.removeprefix(base).replace('.', '/')}" if base else module.replace(".", "/")
    found = next((each for each in (f"{path}.py", f"{path}/__init__.py") if (ROOT / each).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{module} of the API reference (docs/api.py) has no file")
    return found


def summary(module: str) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse((ROOT / source(module)).read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".:")
