"""The autoencoders that come with the package, and how they are made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooked_vla import HookedVLA
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.training import QUICK
from hooked_vla.rollouts.sae.zoo import DTYPE, SITES, train_zoo
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.evaluate import evaluate
from hooked_vla.sae.files import SHIPPED, WEIGHTS, shipped_saes
from hooked_vla.weights import shipped_policies

LITTLE = replace(QUICK, steps=20, batch_size=64, evaluated=500)
MOST_BYTES = 10_000_000


def test_they_are_made_again(tmp_path: Path) -> None:
    found = train_zoo("smolvla-tabletop", tmp_path, episodes=2, amount=LITTLE)
    assert [sae.config.site for sae, _ in found] == list(SITES)
    for sae, evaluation in found:
        folder = tmp_path / "smolvla-tabletop" / sae.config.site
        assert sorted(each.name for each in folder.iterdir()) == ["config.json", "evaluation.json", WEIGHTS]
        assert json.loads((folder / "evaluation.json").read_text()) == evaluation.to_json()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            assert file.get_tensor("w_dec").dtype == DTYPE


def test_a_policy_without_the_sites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="act-tabletop has none of the sites"):
        train_zoo("act-tabletop", tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_shipped_policy_that_has_the_sites_comes_with_them() -> None:
    wanted = [
        f"{name}/{site}"
        for name in shipped_policies()
        for site in SITES
        if site in HookedVLA.from_pretrained(name).points
    ]
    assert shipped_saes() == sorted(wanted)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("name", shipped_saes())
def test_a_shipped_one_reconstructs_what_its_policy_thinks(name: str, tmp_path: Path) -> None:
    policy, site = name.split("/")
    told = json.loads((SHIPPED / name / "evaluation.json").read_text())
    task = get_suite("goal").tasks[0].id
    store = collect(policy, "goal", site, 1, 700_000, tmp_path / "store", [task])
    found = evaluate(SparseAutoencoder.from_pretrained(name), store.read(site, torch.arange(store.n_rows(site))))
    assert told["explained_variance"] > 0.9
    # one episode of one task varies less than many of all
    assert found.explained_variance > told["explained_variance"] - 0.15
