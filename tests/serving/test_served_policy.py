"""The served model: the same actions as the model's own, edits while it runs and only then, a memory per client."""

import numpy as np
import pytest
import torch

from hooked_vla import HookedVLA, HookPoint, Observation
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.serving.policy import ServedPolicy

SITE = "vlm.blocks.0.hook_resid_post"


def look(model: HookedVLA, seed: int = 0) -> Observation:
    features, draw = model.spec.features, np.random.default_rng(seed)
    images = {camera: draw.integers(0, 256, (64, 64, 3), dtype=np.uint8) for camera in features.cameras}
    return Observation(images, draw.normal(size=features.d_state).astype(np.float32), "lift the block")


def draws(model: HookedVLA, seed: int, env_step: int = 0) -> list[torch.Tensor]:
    return SeededNoise.of(model, look(model))([seed], env_step)


def listeners(model: HookedVLA) -> int:
    return sum(len(point.listeners) for point in model.points.values())


def double(value, hook):
    return value * 2


# with and without state, language, a second camera, a memory
@pytest.mark.parametrize("name", ["smolvla", "openvla", "act", "diffusion"])
def test_a_served_model_answers_like_itself(name):
    model = HookedVLA.from_spec(name, "tiny", seed=0)
    chunk = ServedPolicy(model).session().act(look(model), seed=5)
    noise = draws(model, 5)
    if model.spec.features.n_obs_steps > 1:
        expected = model.select_action(look(model), noise)
    else:
        expected = model.predict_action_chunk(look(model), noise)[0]
    assert chunk.dtype == np.float32 and chunk.shape == (len(chunk), model.spec.features.d_action)
    assert np.array_equal(chunk, expected.numpy())


def test_a_seed_leaves_the_global_generator_alone(tiny_model):
    session = ServedPolicy(tiny_model).session()
    before = torch.get_rng_state()
    first, again = (session.act(look(tiny_model), seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first, again)
    assert not np.array_equal(first, session.act(look(tiny_model), env_step=8, seed=3))
    assert not np.array_equal(first, session.act(look(tiny_model)))
    assert not torch.equal(before, torch.get_rng_state())


def test_an_edit_is_active_while_it_serves_and_only_then(tiny_model):
    plain = ServedPolicy(tiny_model).session().act(look(tiny_model), seed=3)
    served = ServedPolicy(tiny_model, edits=[(SITE, double)])
    edited = served.session().act(look(tiny_model), seed=3)
    with torch.no_grad():
        expected = tiny_model.run_with_hooks(look(tiny_model), [(SITE, double)], noise=draws(tiny_model, 3)).chunk[0]
    assert np.array_equal(edited, expected.numpy()) and not np.allclose(edited, plain)
    assert listeners(tiny_model) == 0
    assert served.metadata["edits"] == [SITE]


def test_edits_know_the_environment_step(tiny_model):
    seen = []

    def note(value, hook):
        seen.append((hook.run.env_step, hook.denoise_step))

    session = ServedPolicy(tiny_model, [("expert.hook_velocity", note)]).session()
    session.act(look(tiny_model), env_step=24)
    session.act(look(tiny_model))
    steps = range(tiny_model.n_denoise_steps)
    assert seen == [(24, step) for step in steps] + [(None, step) for step in steps]
    assert tiny_model.run_state.env_step is None


def test_a_failing_edit_leaves_nothing_behind(tiny_model):
    def fail(value, hook):
        raise ArithmeticError("no")

    session = ServedPolicy(tiny_model, [(SITE, fail)]).session()
    with pytest.raises(ArithmeticError):
        session.act(look(tiny_model), env_step=3)
    assert listeners(tiny_model) == 0 and tiny_model.run_state.env_step is None


def test_an_edit_that_never_fires_is_an_error(tiny_model, monkeypatch):
    # a point that no forward pass visits
    monkeypatch.setitem(tiny_model._points, "vlm.hook_embed_action", HookPoint("batch seq d_model"))
    session = ServedPolicy(tiny_model, [("vlm.hook_embed_action", double)]).session()
    with pytest.raises(RuntimeError, match="never fired.*vlm.hook_embed_action"):
        session.act(look(tiny_model))


def test_unknown_sites_cameras_and_keys_are_refused_beforehand(tiny_model):
    with pytest.raises(KeyError, match="no hook point matches 'vlm.blokcs"):
        ServedPolicy(tiny_model, edits=[("vlm.blokcs.0.hook_resid_post", double)])
    with pytest.raises(ValueError, match=r"no cameras \['top'\]"):
        ServedPolicy(tiny_model, cameras={"image": "top"})
    with pytest.raises(ValueError, match="one set of statistics"):
        ServedPolicy(tiny_model, unnorm_key="bridge")


def test_clients_that_look_back_remember_their_own_past():
    model = HookedVLA.from_spec("vqbet", "tiny", seed=0)
    policy = ServedPolicy(model)
    ours, other = policy.session(), policy.session()
    served = []
    for step in range(6):
        other.act(look(model, seed=100 + step), seed=9)
        served.append(ours.act(look(model, seed=step), seed=step))
    model.reset()
    for step, action in enumerate(served):
        expected = model.select_action(look(model, seed=step), draws(model, step) if step % 4 == 0 else None)
        assert np.array_equal(action, expected.numpy())
    ours.reset()
    assert np.array_equal(ours.act(look(model, seed=0), seed=0), served[0])
    assert policy.metadata["n_action_steps"] == 1
    model.reset()
