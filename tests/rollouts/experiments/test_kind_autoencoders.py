"""Experiments' autoencoders: the package's where there is one, else trained in the run, and found again."""

from dataclasses import replace

import pytest
import torch
from sae_case import context

from hooked_vla.rollouts.experiments.kinds import autoencoders as module
from hooked_vla.rollouts.experiments.kinds.autoencoders import (
    COLUMNS,
    HELD_OUT,
    activations,
    autoencoders,
    origin_notes,
    sae_sites,
)
from hooked_vla.rollouts.records import read_episodes
from hooked_vla.sae import files
from hooked_vla.sae.autoencoder import SparseAutoencoder

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in which both sites' autoencoders were trained."""
    run = context("E7", tmp_path_factory.mktemp("run"), train_episodes=2)
    autoencoders(run, [VLM, EXPERT], run.definition.settle(False))
    return run


def test_what_is_trained_is_told_and_found_again(made, monkeypatch) -> None:
    settings = made.definition.settle(False)
    monkeypatch.setattr(module, "train_on_store", None)
    saes, table = autoencoders(made, [VLM, EXPERT], settings)
    assert [sae.config.site for sae in saes] == [VLM, EXPERT]
    assert tuple(table.columns) == COLUMNS and table["origin"].tolist() == ["this run"] * 2
    assert table["steps"].tolist() == [4, 4] and table["episodes"].tolist() == [2, 2]
    assert min(table["rows"].tolist()) > 0
    assert table["features"].tolist() == [8 * width for width in table["d_model"]]
    [note] = origin_notes(table, settings)
    assert VLM in note and "trained in this run, on 2 episodes" in note
    # none of the run's own starts is trained on
    store = activations(made, [VLM, EXPERT], settings, 2)
    seeds = read_episodes(store.folder / "rollouts")["seed"].to_pylist()
    assert seeds == [made.seed + HELD_OUT, made.seed + HELD_OUT + 1]


def test_a_label_is_of_one_set(made) -> None:
    settings = made.definition.settle(False)
    with pytest.raises(ValueError, match=r"has autoencoders 'saes' of .*, asked for .*give them another label"):
        autoencoders(made, [EXPERT], settings)
    with pytest.raises(ValueError, match="give them another label"):
        autoencoders(made, [VLM, EXPERT], settings, pooling="mean")


def test_several_sets_share_activations(made) -> None:
    """Only what differs is made anew."""
    settings = made.definition.settle(False)
    [vlm, expert], _ = autoencoders(
        made, [VLM, EXPERT], settings, label="wide", changes={"n_features": 40, "k": 3}, stored="saes"
    )
    assert vlm.config.n_features == 40 == expert.config.n_features and vlm.config.k == 3
    assert sorted(path.name for path in made.folder("activations").iterdir()) == ["saes"]


def test_the_packages_are_taken_where_there_are_any(made, tmp_path, monkeypatch) -> None:
    trained = SparseAutoencoder.from_pretrained(made.folder("saes") / EXPERT)
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    trained.save_pretrained(tmp_path / "shipped" / made.model_name / EXPERT)
    run = replace(made, out=tmp_path / "run")
    settings = replace(run.definition.settle(False), shipped=True)
    assert sae_sites(run, settings) == [EXPERT] and sae_sites(run, replace(settings, sites=(VLM,))) == [VLM]
    with monkeypatch.context() as patched:
        patched.setattr(module, "train_on_store", None)
        [sae], table = autoencoders(run, [EXPERT], settings)
    assert torch.equal(sae.w_enc, trained.w_enc) and not run.folder("saes").exists()
    assert table["origin"].tolist() == ["package"] and table["rows"].tolist()[0] > 0
    assert origin_notes(table, settings) == [f"The autoencoders of {EXPERT} come with the package."]
    # those of other rows are not what is asked for
    _, table = autoencoders(run, [EXPERT], settings, pooling="mean", label="means")
    assert table["origin"].tolist() == ["this run"]


def test_sites_are_the_middle_of_each_pathway(made) -> None:
    settings = made.definition.settle(False)
    # no action depends on the last block of the vlm, and actions are made of the last block of the expert alone
    assert sae_sites(made, settings) == [VLM, EXPERT]
    with pytest.raises(KeyError, match="has no sites"):
        sae_sites(made, replace(settings, sites=("vlm.blocks.9.hook_resid_post",)))
    with pytest.raises(ValueError, match="train_episodes must be at least 2"):
        replace(settings, train_episodes=1)
