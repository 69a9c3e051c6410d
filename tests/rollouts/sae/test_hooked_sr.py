"""Autoencoders in the loop: the identity changes nothing, noise is as large as the error, and only what is named."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close
from typer.testing import CliRunner

from hooked_vla import HookedVLA, Observation
from hooked_vla.cli import app
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.sae import hooked_sr as module
from hooked_vla.rollouts.sae.hooked_sr import HookedSR, hooked_sr, loop_arms
from hooked_vla.rollouts.sae.loop_arms import IDENTITY, LoopArm
from hooked_vla.rollouts.settings import Options, constant_text
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.presets import preset

# the suite without a simulator is beside the tests of the runner
sys.path.insert(0, str(Path(__file__).parent.parent))
from toy_suite import ToyEnv, tiny, toy_suite

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
OPTIONS = Options(n_envs=4, n_action_steps=4, image_size=32, max_steps=8)


class NearEnv(ToyEnv):
    """Solved after six steps in half of all places, which a policy of random weights comes upon."""

    def _info(self):
        info = super()._info()
        return info | {"is_success": self.t >= 6 and int(abs(self.x) * 1000) % 2 == 0}


def near_suite():
    return toy_suite(make=NearEnv, tasks=toy_suite().tasks[:2])


@pytest.fixture(scope="module")
def model():
    return tiny("smolvla")


@pytest.fixture(scope="module")
def seen(model):
    """What the sites hold for two observations of different length, and their segments."""
    images = {c: torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8) for c in ("agent", "wrist")}
    obs = Observation(images, torch.randn(2, 4), ["go", "go a long way round"])
    with constant_text(model.processor, True), torch.no_grad():
        noise = SeededNoise.of(model, Observation({c: i[:1] for c, i in images.items()}, torch.randn(1, 4), "go"))
        _, cache = model.run_with_cache(obs, [VLM, EXPERT], noise=noise([1, 2], 0))
    return obs, noise, cache


def random_sae(model, site: str, k: int = 8, **changes) -> SparseAutoencoder:
    width = int(model.hook_points[site].shape[-1])
    config = preset(
        "hooked", "tiny", site, width, **{"architecture": "topk", "n_features": 4 * width, "k": k, **changes}
    )
    sae = SparseAutoencoder(config)
    sae.start(torch.randn(200, width, generator=torch.Generator().manual_seed(0)))
    return sae.eval()


def perfect_sae(model, site: str) -> SparseAutoencoder:
    """x = relu(x) - relu(-x)."""
    width = int(model.hook_points[site].shape[-1])
    config = SAEConfig(model="tiny", site=site, d_model=width, n_features=2 * width, architecture="relu",
                       normalisation="none", training=None)  # fmt: skip
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.w_enc.copy_(both)
        sae.w_dec.copy_(both)
    return sae.eval()


def test_the_identity_is_exact_and_noise_as_large_as_the_error(model, tmp_path):
    saes = [random_sae(model, VLM), perfect_sae(model, EXPERT)]
    run = partial(hooked_sr, model, near_suite(), saes, 4, 3, tmp_path / "loop", options=OPTIONS)
    found = run()
    assert found.is_exact and found.baseline.successes > 0 and found.baseline.episodes == 4
    for site in (VLM, EXPERT):
        identity = found.arms[f"{site}: identity"]
        assert identity.unchanged == 4 and identity.ratio == 1.0 and identity.fidelity.fvu == 0.0
        assert identity.test.p_value == 1.0 and np.isnan(identity.p_holm) and identity.against_noise is None
    for way in ("token", "mean"):
        arm, noise = found.arms[f"{VLM}: {way}"], found.arms[f"{VLM}: noise: {way}"]
        assert arm.unchanged == 0 == noise.unchanged and arm.fidelity.fvu > 0.05
        assert arm.fidelity.fvu == pytest.approx(noise.fidelity.fvu, rel=1e-4)
        assert arm.fidelity.relative == pytest.approx(noise.fidelity.relative, rel=1e-4)
        assert arm.against_noise is not None and arm.ratio == arm.rate.successes / found.baseline.successes
        assert arm.p_holm >= arm.test.p_value
        assert found.arms[f"{EXPERT}: {way}"].fidelity.fvu < 1e-9
    # a pooled error adds up over the tokens of a row, noise token by token would not
    pooled = found.arms[f"{VLM}: noise: mean"].fidelity
    assert pooled.of_means is not None and pooled.of_means < 0.9
    kept = json.loads((tmp_path / "loop" / "report.json").read_text())
    assert kept == json.loads(json.dumps(found.to_json())) and kept["is_exact"]
    with pytest.MonkeyPatch.context() as patched:
        # nothing is measured again
        patched.setattr(module, "FidelityWatcher", None)
        assert json.dumps(run().to_json()) == json.dumps(found.to_json())


def test_an_identity_that_changes_a_bit_is_noticed(model, tmp_path, monkeypatch):
    real = LoopArm._direct

    def off(self, value, hook):
        return real(self, value, hook) if self.way != IDENTITY else value * (1 + 2**-20)

    monkeypatch.setattr(LoopArm, "_direct", off)
    sae = random_sae(model, EXPERT, normalisation="token_norm")
    found = hooked_sr(model, near_suite(), [sae], 2, 3, tmp_path / "loop", ["token"], options=OPTIONS)
    assert not found.is_exact and found.arms[IDENTITY].unchanged < 2
    assert isinstance(found, HookedSR) and not found.to_json()["is_exact"]


def changed(model, arm: LoopArm, seen):
    """The value of the arm's site under it."""
    obs, noise, _ = seen
    rows = [Cell(i, arm.name, "walk", i) for i in range(2)]
    with constant_text(model.processor, True), torch.no_grad(), model.hooks(arm.hooks(rows)):
        return model.run_with_cache(obs, arm.site, noise=noise([1, 2], 0))[1][arm.site]


@pytest.mark.parametrize("normalisation", ["mean_norm", "token_norm"])
@pytest.mark.parametrize("site", [VLM, EXPERT])
def test_every_way_is_its_formula_on_the_tokens_it_names(model, seen, site, normalisation):
    """Once spliced, once as the autoencoder is; padding and what is not named keep their bits."""
    sae = random_sae(model, site, normalisation=normalisation)
    cache = seen[2]
    # of the expert the first denoise step: the later ones follow from it
    plain = cache[site][0] if site == EXPERT else cache[site]
    segments = cache.segments[model.points[site].streams["seq"]]
    names = [name for name in segments.present() if name != "pad"]
    everything = torch.stack([segments.mask(name) for name in names]).any(0).expand(plain.shape[:2])
    assert site == EXPERT or not bool(everything.all())
    for arm in loop_arms(sae, names, ("token", "mean", "segment_mean"), by_segment=True):
        made = changed(model, arm, seen)
        made = made[0] if site == EXPERT else made
        mask = everything if arm.tokens is None else torch.stack([segments.mask(n) for n in arm.tokens]).any(0)
        mask = mask.expand(plain.shape[:2])
        assert torch.equal(made[~mask], plain[~mask])
        if arm.way == IDENTITY:
            assert torch.equal(made, plain)
            continue
        expected = plain.clone()
        for row in range(2):
            groups = [mask[row]]
            if arm.way == "segment_mean":
                groups = [segments.mask(name).expand(plain.shape[:2])[row] for name in arm.tokens]
            for group in groups:
                x = plain[row][group]
                if len(x) and arm.way == "token":
                    expected[row][group] = sae(x).detach()
                elif len(x):
                    mean = x.mean(0, keepdim=True)
                    expected[row, group] = x + (sae(mean).detach() - mean)
        if arm.noise is None:
            assert_close(made, expected)
        else:
            assert_close((made - plain).norm(dim=-1), (expected - plain).norm(dim=-1))
            assert float((made - expected).abs().max()) > 1e-2


def test_denoise_steps_are_edited_one_by_one(model, seen):
    sae = random_sae(model, EXPERT)
    names = ["action"]
    plain = seen[2][EXPERT]
    arms = {arm.name: arm for arm in loop_arms(sae, names, ["token", "mean"], denoise_steps=[1])}
    for name in ("token at denoise step 1", "mean at denoise step 1", "noise: mean at denoise step 1"):
        made = changed(model, arms[name], seen)
        assert torch.equal(made[0], plain[0]) and not torch.allclose(made[1], plain[1])


def test_noise_follows_from_the_seed_and_lasts_as_long_as_it_is_told(model, seen):
    sae, obs = random_sae(model, VLM), seen
    point = model.points[VLM]

    def directions(lasts: str, step: int, way: str = "token") -> torch.Tensor:
        arm = LoopArm("a", sae, way, None, None, lasts)
        ((_, fn),) = arm.hooks([Cell(i, "a", "walk", i) for i in range(2)])
        got = []

        def look(value, hook):
            hook.run.env_step = step
            got.append(Layout.of(hook).flatten(fn(value.clone(), hook) - value))

        with constant_text(model.processor, True), torch.no_grad(), model.hooks([(VLM, look)]):
            model.run_with_cache(obs[0], VLM, noise=obs[1]([1, 2], 0))
        point.run.env_step = None
        return got[0]

    assert torch.equal(directions("step", 0), directions("step", 0))
    assert not torch.allclose(directions("step", 0), directions("step", 4))
    assert torch.equal(directions("episode", 0), directions("episode", 4))
    shared = directions("step", 0, "mean")[0]
    unit = shared / shared.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    kept = shared.norm(dim=-1) > 1e-3
    assert_close(unit[kept], unit[kept][:1].expand_as(unit[kept]))


def test_mistakes_are_named(model, tmp_path):
    run = partial(hooked_sr, model, near_suite(), episodes=2, seed=0, out=tmp_path / "x", options=OPTIONS)
    sae = random_sae(model, VLM)
    with pytest.raises(ValueError, match="one autoencoder a site"):
        run([sae, sae])
    other = SparseAutoencoder(sae.config.changed(site="vlm.blocks.99.hook_resid_post"))
    with pytest.raises(KeyError, match="which this model does not have"):
        run([other])
    for normalisation in ("none", "token_norm"):
        narrow = SparseAutoencoder(sae.config.changed(d_model=7, normalisation=normalisation))
        with pytest.raises(ValueError, match="wide"):
            run([narrow])
    transcoder = SparseAutoencoder(preset("hooked", "tiny", VLM, 8, architecture="transcoder", output_site=EXPERT, k=2,
                                          d_output=8, subtract_decoder_bias=False, n_features=16))  # fmt: skip
    with pytest.raises(ValueError, match="it cannot stand in"):
        run([transcoder])
    with pytest.raises(ValueError, match="drop_negative=True"):
        run([SparseAutoencoder(replace(sae.config, relu=False))])
    with pytest.raises(ValueError, match="way must be one of"):
        run([sae], pools=["max"])
    with pytest.raises(ValueError, match="at least one way"):
        run([sae], pools=[])
    with pytest.raises(ValueError, match="runs once per chunk"):
        run([sae], denoise_steps=[0])
    with pytest.raises(ValueError, match="needs the names of segments"):
        LoopArm("a", sae, "segment_mean")
    with pytest.raises(ValueError, match="noise must be"):
        LoopArm("a", sae, "token", noise="always")
    assert not (tmp_path / "x").exists()


def call(*arguments: str):
    return CliRunner().invoke(app, ["sae", "eval", "--model", "smolvla-tabletop", *arguments], terminal_width=300)


def test_the_command_runs_and_says_mistakes_in_one_line(tmp_path):
    """The small policy of the package; all autoencoders of a run's folder are put into the loop, one by one."""
    site, out = "expert.blocks.1.hook_resid_post", tmp_path / "loop"
    # with what it gives back the policy succeeds, so that no episode goes on to its limit
    perfect_sae(HookedVLA.from_pretrained("smolvla-tabletop"), site).save_pretrained(tmp_path / "run" / site)
    start = ["--episodes", "1", "--n-envs", "1", "--n-action-steps", "8", "--out", str(out)]
    done = call("--sae", str(tmp_path / "run"), *start, "--pools", "token")
    assert done.exit_code == 0 and "identity" in done.output and "unedited: " in done.output, done.output
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["identity", "token", "noise: token"] and report["is_exact"]
    for arguments, said in (
        (["--sae", "nowhere", *start], "no folder with"),
        (["--sae", str(tmp_path / "run"), *start, "--pools", "max"], "way must be one of"),
        (["--sae", str(tmp_path / "run"), *start, "--noise", "long"], "noise must be"),
    ):
        wrong = call(*arguments)
        assert wrong.exit_code == 2 and said in " ".join(wrong.output.replace("│", "").split()), wrong.output
