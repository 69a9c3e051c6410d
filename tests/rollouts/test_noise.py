"""What a policy draws follows from episode seed and environment step alone, for every model."""

import numpy as np
import pytest
import torch
from toy_suite import tiny

from hooked_vla import HookedVLA, Observation, list_models
from hooked_vla.rollouts.noise import Draw, SeededNoise


def make_observation(model: HookedVLA, rows: int) -> Observation:
    rng, features = np.random.default_rng(0), model.spec.features
    images = {camera: rng.integers(0, 256, (rows, 72, 72, 3), np.uint8) for camera in features.cameras}
    state = rng.normal(size=(rows, max(features.d_state, 1))).astype(np.float32)
    return Observation(images, state, ["put the red block on the cyan pad"] * rows)


@pytest.mark.parametrize("name", list_models())
def test_every_model_acts_from_seeded_noise(name: str) -> None:
    model = tiny(name)
    before = torch.random.get_rng_state()
    noise = SeededNoise.of(model, make_observation(model, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    obs = make_observation(model, 2)
    chunk, other_row = (model.predict_action_chunk(obs, noise(seeds, 8)) for seeds in ([5, 6], [5, 7]))
    assert torch.equal(other_row[0], chunk[0])
    if noise.draws:
        assert not torch.equal(other_row[1], chunk[1]) or all(draw.kind == "choice" for draw in noise.draws)
        for first, second in zip(noise([5, 6], 8), noise([6, 5], 8), strict=True):
            assert torch.equal(first.flatten(), second.unflatten(0, (2, -1)).flip(0).flatten())
            assert not torch.equal(first, second)
        assert not any(map(torch.equal, noise([5, 6], 8), noise([5, 6], 16)))


def test_models_that_draw_nothing_get_nothing_and_others_what_they_need() -> None:
    draws = {
        name: SeededNoise.of(model, make_observation(model, 1)).draws
        for name in ("act", "smolvla", "diffusion", "vqbet")
        for model in [tiny(name)]
    }
    assert draws["act"] == ()
    assert draws["smolvla"] == (Draw("normal", (8, 8)),)
    # the start, and fresh noise at every step but the last
    assert len(draws["diffusion"]) == tiny("diffusion").n_denoise_steps
    assert [draw.kind for draw in draws["vqbet"]] == ["choice"]


def test_draws_have_their_distributions() -> None:
    kinds = [
        Draw("normal", (2000,)), Draw("uniform", (2000,)), Draw("choice", (1, 2000)), Draw("integers", (2000,), 7.0),
        Draw("beta", (2000,), 1.5),
    ]  # fmt: skip
    normal, uniform, exponential, integers, beta = (each.float() for each in SeededNoise(kinds)([0, 1, 2, 3], 0))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert uniform.min() >= 0 and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 0.02
    assert exponential.shape == (4, 2000) and exponential.min() > 0 and abs(exponential.mean() - 1) < 0.05
    assert integers.unique().tolist() == list(range(7))
    # the mean of Beta(a, 1) is a / (a + 1)
    assert abs(beta.mean() - 0.6) < 0.02


def test_several_rows_are_refused(tiny_model: HookedVLA) -> None:
    with pytest.raises(ValueError, match="one row, got 2"):
        SeededNoise.of(tiny_model, make_observation(tiny_model, 2))
