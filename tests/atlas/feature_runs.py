"""A run with a feature index, its activations' episodes and a steered feature, made once a test session."""

import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from shared_folder import shared_folder
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.index import build_index
from hooked_vla.rollouts.sae.steering import Steered, dose_arms, steer
from hooked_vla.rollouts.settings import Options
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import preset

MODEL, SITE, EXPERT = "smolvla-tabletop", "vlm.blocks.1.hook_resid_post", "expert.blocks.2.hook_resid_post"
N_FEATURES, STEERED = 40, 7
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def feature_run(factory: pytest.TempPathFactory) -> tuple[Path, Steered]:
    """RUN/{activations,vlm,expert,steered}, and what the steering came to. Leave it as it is; copy it to change it."""
    folder = shared_folder(factory, "features", _make)
    return folder / "RUN", pickle.loads((folder / "steered.pickle").read_bytes())


@unchecked_shapes()
def _make(shared: Path) -> None:
    folder = shared / "RUN"
    model = HookedVLA.from_pretrained(MODEL).requires_grad_(False)
    options = Options(n_envs=2, max_steps=12)
    store = collect(model, "goal", [SITE, EXPERT], 4, 0, folder / "activations", options=options, name=MODEL)
    saes = {}
    for name, site in (("vlm", SITE), ("expert", EXPERT)):
        config = preset("hooked", MODEL, site, store.widths[site], architecture="topk", n_features=N_FEATURES, k=4)
        sae = SparseAutoencoder(config)
        sae.start(store.read(site, torch.arange(store.n_rows(site))))
        saes[name] = sae.eval()
        build_index(store, saes[name], folder / name)
    arms = dose_arms(EXPERT, saes["expert"].w_dec[STEERED], [-0.5, 0.5], seed=0, project_out=False)
    steered = steer(model, "goal", arms, 2, 50, folder / "steered", options=options, name=MODEL)
    (shared / "steered.pickle").write_bytes(pickle.dumps(steered))


def describe_all(index: Path, text: str) -> None:
    """Give every feature of an index a description."""
    file = index / "features.parquet"
    table = pq.read_table(file)
    place = table.column_names.index("description")
    pq.write_table(table.set_column(place, "description", [[f"{text} {i}" for i in range(len(table))]]), file)
