"""Autoencoders of a policy as it acts, and of a store: trained, evaluated on other episodes, kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.training import (
    QUICK,
    QUICK_MEANS,
    is_another,
    quick_amount,
    read_changes,
    train_on_policy,
    train_on_store,
)
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.rows import Capture
from hooked_vla.sae.store import TokenStore

SITES = "expert.blocks.[01].hook_resid_post"
SITE = "expert.blocks.1.hook_resid_post"
LITTLE = replace(QUICK, steps=50, batch_size=64, buffer_rows=2560, evaluated=800)


def call(*arguments: str):
    return CliRunner().invoke(app, ["sae", "train", *arguments], terminal_width=200)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("store") / "s"
    # of one task, so that what is held out is alike
    task = get_suite("goal").tasks[0].id
    return collect(ModelSource("smolvla-tabletop"), "goal", SITE, 4, 0, folder, [task], Options(4))


def test_all_sites_of_a_policy_train_as_it_acts(tmp_path: Path) -> None:
    found = train_on_policy(
        ModelSource("smolvla-tabletop"), "goal", SITES, "hooked", LITTLE, tmp_path, 0, {"rate": 3e-3}, Options(4), False
    )
    assert [sae.config.site for sae, _ in found] == [f"expert.blocks.{i}.hook_resid_post" for i in range(2)]
    for sae, evaluation in found:
        assert evaluation.rows == 800 and evaluation.explained_variance > 0.3
        folder = tmp_path / sae.config.site
        again = SparseAutoencoder.from_pretrained(folder)
        assert torch.equal(again.w_dec, sae.w_dec) and again.config.model == "smolvla-tabletop"
        assert json.loads((folder / "evaluation.json").read_text()) == evaluation.to_json()
        assert (folder / "log.csv").read_text().startswith("step,loss,fvu,l0,aux,dead,rate\n50,")
    # each has directions of its own
    assert not torch.equal(found[0][0].w_dec, found[1][0].w_dec)


@pytest.mark.parametrize("architecture", ["temporal", "matryoshka"])
def test_a_store_trains_and_keeps_episodes_for_the_evaluation(
    store: TokenStore, tmp_path: Path, architecture: str
) -> None:
    changes = {"architecture": architecture, "rate": 3e-3}
    [(sae, evaluation)] = train_on_store(
        store, SITE, "hooked", "smolvla-tabletop", LITTLE, tmp_path, 0, changes, "cpu", False
    )
    assert sae.config.architecture == architecture
    assert 500 < evaluation.rows <= 800 and evaluation.explained_variance > 0.5


def test_a_store_is_used_for_what_it_holds(store: TokenStore, tmp_path: Path) -> None:
    def made(name: str, model: str | None, changes: dict, kept: TokenStore = store):
        return train_on_store(kept, SITE, name, model, LITTLE, tmp_path / "out", 0, changes, "cpu", False)

    with pytest.raises(ValueError, match="keeps rows of pooling 'token', but the preset 'drvla' is of 'mean'"):
        made("drvla", "smolvla-tabletop", {})
    with pytest.raises(ValueError, match="holds activations of 'smolvla-tabletop', not of 'pi05-tabletop'"):
        made("hooked", "pi05-tabletop", {})
    [(sae, _)] = made("hooked", None, {"rate": 3e-3})
    assert sae.config.model == "smolvla-tabletop"
    # the same folder is not gone on with on other rows, and keeps what it has
    before = (tmp_path / "out" / SITE / "evaluation.json").read_bytes()
    other = TokenStore(shutil.copytree(store.folder, tmp_path / "other"))
    other.shards[0][0] = replace(other.shards[0][0], sha256="0" * 64)
    with pytest.raises(ValueError, match="was changed: its SHA-256"):
        made("hooked", None, {"rate": 3e-3}, other)
    other.verify = lambda progress: None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="begun with other settings: rows.store"):
        made("hooked", None, {"rate": 3e-3}, other)
    assert (tmp_path / "out" / SITE / "evaluation.json").read_bytes() == before


def test_a_transcoder_trains_as_the_policy_acts(tmp_path: Path) -> None:
    output = "expert.blocks.2.hook_resid_post"
    changes = read_changes(["architecture=transcoder", f"output_site={output}", "k=8", "rate=3e-3"])
    capture = Capture(SITE, denoise_steps=frozenset({0, 9}))
    policy = ModelSource("smolvla-tabletop")
    [(sae, evaluation)] = train_on_policy(
        policy, "goal", capture, "hooked", LITTLE, tmp_path, 0, changes, Options(4), False
    )
    assert (sae.config.site, sae.config.target) == (SITE, output)
    assert sae.config.d_output == sae.w_dec.shape[1] and evaluation.explained_variance > 0.2
    with pytest.raises(ValueError, match="begun with other settings: rows.capture.denoise_steps"):
        train_on_policy(policy, "goal", SITE, "hooked", LITTLE, tmp_path, 0, changes, Options(4), False)


def test_checkpoints_are_told_apart_as_far_as_names_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_another("smolvla-tabletop", "pi05-tabletop") and not is_another("a", "a")
    assert not is_another("runs/mine", str(tmp_path / "runs/mine"))
    # a model that was handed over as an object is called by its family
    assert not is_another("smolvla", "smolvla-tabletop")


def test_quick_means_are_few_means() -> None:
    assert quick_amount("hooked", {}) is QUICK and quick_amount("hooked", {"pooling": "mean"}) is QUICK_MEANS
    assert quick_amount("drvla", {}) is QUICK_MEANS and quick_amount("drvla", {"pooling": "token"}) is QUICK


def test_one_episode_is_too_few(store: TokenStore, tmp_path: Path) -> None:
    store = TokenStore(store.folder)
    store.episodes = [0]
    with pytest.raises(ValueError, match="one to train on and one to evaluate are needed"):
        train_on_store(store, SITE, "hooked", "smolvla-tabletop", LITTLE, tmp_path, 0, {}, "cpu", False)


def test_the_command_prints_the_evaluation_and_goes_on(store: TokenStore, tmp_path: Path) -> None:
    arguments = ["--model", "smolvla-tabletop", "--site", SITE, "--store", str(store.folder), "--out",
                 str(tmp_path / "out"), "--quick", "--steps", "20", "--set", "k=8", "--set",
                 "architecture=topk"]  # fmt: skip
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert f"{SITE}: explained variance" in done.output and "L0 8.0" in done.output
    before = (tmp_path / "out" / SITE / "sae.safetensors").read_bytes()
    assert call(*arguments).exit_code == 0
    assert (tmp_path / "out" / SITE / "sae.safetensors").read_bytes() == before
    other = call(*arguments, "--seed", "3")
    assert other.exit_code == 2 and "begun with other settings" in " ".join(other.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--site", "expert.blocks.9.hook_resid_post"], "expert.blocks.9.hook_resid_post"),
        (["--site", "expert.blocks.0.attn.hook_pattern"], "needs vectors"),
        (["--site", SITE, "--preset", "mine"], "unknown preset 'mine'"),
        (["--site", SITE, "--set", "kk=3"], "unknown settings ['kk']"),
        (["--site", SITE, "--set", "k"], "written name=value"),
        (["--site", SITE, "--set", "k=abc"], "k must be int | None, got 'abc'"),
        (["--site", SITE, "--set", "rate=high"], "rate must be float, got 'high'"),
        (["--site", SITE, "--set", "model=x"], "unknown settings ['model']"),
        (["--site", SITE, "--set", "k=true"], "k must be int | None, got True"),
        (["--site", SITE, "--set", "steps=3", "--steps", "3"], "say the steps once"),
        (["--site", SITE, "--set", "architecture=relu", "--set", "steps=3"], "relu is sparse by its penalty alone"),
        (["--site", SITE, "--set", "k=5000"], "k must be in 1..768, the number of features, got 5000"),
        (["--site", SITE, "--suite", "nowhere"], "nowhere"),
        (["--site", SITE, "--store", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path: Path, more: list[str], said: str) -> None:
    done = call("--model", "smolvla-tabletop", "--out", str(tmp_path / "s"), "--quick", *more)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", "").split()), done.output
    assert not (tmp_path / "s").exists()


def test_changes_are_read_as_json_or_text() -> None:
    found = read_changes(["k=8", "rate=1e-3", "architecture=topk", "prefixes=[4, 8]", "clip=null"])
    assert found == {"k": 8, "rate": 1e-3, "architecture": "topk", "prefixes": (4, 8), "clip": None}
