"""What every family's training objective promises, on tiny random models: it can be fitted, padded steps do not count,
several draws are the mean of single ones, and kept vision features stand for the images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from public_checkpoints import make_observation
from tolerance import assert_close
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, registry
from hooked_vla.inputs import Draws, ModelInputs
from hooked_vla.spec import LanguageVLASpec

# a point whose values at a step are what the objective compares with the target there
PREDICTION = {
    "smolvla": "expert.hook_velocity",
    "act": "head.hook_actions",
    "pi05": "expert.hook_velocity",
    "pi0": "expert.hook_velocity",
    "xvla": "expert.hook_clean_actions",
    "groot_n15": "expert.hook_velocity",
    "groot_n17": "expert.hook_velocity",
    "diffusion": "expert.hook_noise",
    "openvla_oft": "head.hook_actions",
    "openvla_oft/diffuse": "expert.hook_noise",
}
TOKENS = ["openvla", "openvla_oft/parallel"]
FAMILIES = [*PREDICTION, *TOKENS]
# Adam steps that a fit takes
N_STEPS = {"openvla_oft": 95}
# whose objective is another's here
SIBLINGS = ["pi0", "groot_n17", "openvla_oft/parallel"]


@dataclass(frozen=True)
class Case:
    """A tiny model, inputs of three rows, targets for them, and the shape of what it draws once."""

    name: str
    model: HookedVLA
    inputs: ModelInputs
    actions: Tensor

    def draws(self, seed: int, n: int = 1) -> list[Tensor]:
        """What so many draws take, recorded from fresh ones."""
        recorded = Recording(seed)
        with torch.no_grad():
            self.model.net.training_loss(self.inputs, self.actions, None, recorded, self.model.run_state, n)
        return recorded.taken

    def loss(self, valid: Tensor | None = None, noise: list[Tensor] | None = None, n_draws: int = 1) -> Tensor:
        return self.model.training_loss(self.inputs, self.actions, valid, noise, n_draws)


class Recording(Draws):
    """Fresh draws of a seed, kept."""

    def __init__(self, seed: int) -> None:
        super().__init__(None, torch.device("cpu"))
        self.seed, self.taken = seed, []

    def _keep(self, draw: Callable[[], Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1000 * len(self.taken))
            self.taken.append(draw())
        return self.taken[-1]

    def normal(self, shape) -> Tensor:
        return self._keep(lambda: Draws.normal(self, shape))

    def uniform(self, shape) -> Tensor:
        return self._keep(lambda: Draws.uniform(self, shape))

    def beta(self, alpha: float, shape) -> Tensor:
        return self._keep(lambda: Draws.beta(self, alpha, shape))

    def integers(self, n: int, shape) -> Tensor:
        return self._keep(lambda: Draws.integers(self, n, shape))


def make_model(name: str, seed: int) -> HookedVLA:
    """A tiny model; behind a slash, another kind of readout than the spec's."""
    name, _, kind = name.partition("/")
    spec = registry.get_spec(name, "tiny")
    if kind:
        assert isinstance(spec, LanguageVLASpec)
        spec = replace(spec, readout=replace(spec.readout, kind=kind, n_steps=5), tied={})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HookedVLA.from_network(spec, registry.build_network(spec).eval())


@cache
def make_case(name: str) -> Case:
    model = make_model(name, seed=0)
    features, generator = model.spec.features, torch.Generator().manual_seed(5)
    obs = make_observation(batch=3)
    state = torch.randn(3, features.d_state, generator=generator) if features.d_state else None
    inputs = model.prepare(replace(obs, images={c: obs.images[c] for c in features.cameras}, state=state))
    # a diffusion policy denoises more steps than it hands out
    shape = (3, getattr(model.net.head, "horizon", model.net.head.chunk), features.d_action)
    return Case(name, model, inputs, torch.rand(shape, generator=generator) * 1.6 - 0.8)


@pytest.fixture(params=FAMILIES)
def case(request) -> Case:
    case = make_case(request.param)
    case.model.reset_hooks(including_permanent=True)
    case.model.net.zero_grad()
    return case


@unchecked_shapes()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SIBLINGS])
def test_the_objective_can_be_fitted(name: str) -> None:
    model, whole = make_model(name, seed=1), make_case(name)
    with torch.no_grad():
        features = model.net.vision_features(whole.inputs)
    kept = replace(whole.inputs, features=features, images=None).rows([0, 1])
    case = Case(name, model, kept, whole.actions[:2])
    noise = case.draws(seed=7)
    trained = [each for part, each in model.net.named_parameters() if not part.startswith("vision.")]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    losses = []
    for _ in range(N_STEPS.get(name, 40)):
        loss = case.loss(None, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.15 * losses[0], losses[::10]


@unchecked_shapes()
@pytest.mark.parametrize("name", PREDICTION)
def test_what_is_predicted_at_padded_steps_does_not_count(name: str) -> None:
    case = make_case(name)
    noise, steps = case.draws(0), case.actions.shape[1]
    valid = torch.ones(3, steps, dtype=torch.bool)
    assert_close(case.loss(valid, noise), case.loss(None, noise))
    valid[0, steps - 2 :], valid[1] = False, False

    def shifted(step: int) -> Tensor:
        at = torch.arange(steps).eq(step)[:, None]
        with case.model.hooks([(PREDICTION[case.name], lambda value, hook: value + at.to(value.dtype))]):
            return case.loss(valid, noise)

    plain = case.loss(valid, noise)
    # row 0 ends early, row 1 has nothing that counts
    assert (shifted(steps - 1) != plain).tolist() == [False, False, True]
    assert (shifted(0) != plain).tolist() == [True, False, True]


def test_several_draws_are_the_mean_of_single_ones(case: Case) -> None:
    noise = case.draws(3, n=3)
    per_draw = len(noise) // 3
    single = [case.loss(None, noise[i * per_draw : (i + 1) * per_draw]) for i in range(3)]
    assert len({float(each[0].detach()) for each in single}) == (3 if noise else 1)
    together = case.loss(None, noise, n_draws=3)
    assert_close(together, torch.stack(single).mean(0))
    together.sum().backward()
    gradients = {name: each.grad for name, each in case.model.net.named_parameters() if each.grad is not None}
    case.model.net.zero_grad()
    (torch.stack(single).mean(0)).sum().backward()
    for name, parameter in case.model.net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    if noise:
        with pytest.raises(ValueError, match="noise has"):
            case.loss(None, noise, n_draws=2)


@pytest.mark.parametrize("name", ["smolvla", "pi05"])
def test_edits_of_what_the_expert_reads_hold_for_every_draw(name: str) -> None:
    """Whether or not a hook changes the prefix, the expert's layers see the same of it as in single draws."""
    case = make_case(name)
    noise = case.draws(2, n=2)
    with torch.no_grad():
        plain = case.loss(None, noise, n_draws=2)
        with case.model.hooks([("expert.blocks.*.hook_prefix_[kv]", lambda value, hook: value * 1.5)]):
            single = [case.loss(None, noise[:2]), case.loss(None, noise[2:])]
            together = case.loss(None, noise, n_draws=2)
    assert_close(together, torch.stack(single).mean(0))
    assert (together - plain).abs().min() > 1e-4


def test_kept_features_stand_for_the_images(case: Case) -> None:
    net, seen = case.model.net, []
    features = net.vision_features(case.inputs)
    assert features.shape[:1] == (3,) and features.shape[-1] == net.d_features
    kept = replace(case.inputs, features=features.detach(), images=None)
    assert net.vision_features(kept) is kept.features
    noise, acting = case.draws(1, n=2), Recording(2)
    with torch.no_grad():
        losses, actions = case.loss(None, noise, 2), net.sample_actions(case.inputs, acting, case.model.run_state)
        for name in [name for name in case.model.points if name.startswith("vision.")]:
            case.model.add_hook(name, lambda value, hook: seen.append(hook.name))
        assert torch.equal(case.model.training_loss(kept, case.actions, None, noise, 2), losses)
        assert torch.equal(case.model.sample_actions(kept, acting.taken), actions)
    assert not seen
    # kept at less precision, they are used at the model's
    short = replace(kept, features=features.detach().bfloat16())
    with torch.no_grad():
        rounded = case.model.training_loss(short, case.actions, None, noise, 2)
    assert rounded.dtype == losses.dtype and not torch.equal(rounded, losses)
    # segments need no images either
    of_images, of_features = case.model.segments(case.inputs), case.model.segments(kept)
    for stream, segments in of_features.items():
        assert segments.names == of_images[stream].names, stream
        assert torch.equal(segments.labels, of_images[stream].labels), stream


@unchecked_shapes()
def test_hook_points_carry_gradients_and_know_their_rows(case: Case) -> None:
    model, held, steps = case.model, {}, set()

    def hold(value: Tensor, hook) -> None:
        held[hook.name] = (value, hook.segments)
        steps.add(hook.denoise_step)

    points = [name for name in model.points if not name.startswith(("vision.", "decode."))]
    noise = case.draws(0, n=2)
    with model.hooks([(points, hold)]):
        loss = case.loss(None, noise, n_draws=2)
    assert set(held) == set(points) - UNVISITED.get(case.name, {"head.hook_actions"})
    assert steps == {None}
    assert model.run_state.denoise_step is None
    for name, (value, segments) in held.items():
        # parameters that hooks show have no rows
        if segments is not None and model.points[name].axes[0] in ("batch", "image"):
            assert len(segments.labels) == len(value), name
            if "seq" in model.points[name].axes:
                assert segments.labels.shape[1] == value.shape[model.points[name].axes.index("seq")], name
    # an auxiliary loss on any value joins the objective
    value = held["connector.hook_out"][0]
    plain = torch.autograd.grad(loss.sum(), value, retain_graph=True)[0]
    both = torch.autograd.grad(loss.sum() + value.square().sum(), value)[0]
    assert plain.abs().sum() > 0
    assert_close(both - plain, 2 * value)


# points that training does not pass, besides the vision tower's and those of generation
UNVISITED = {
    "act": set(),
    "diffusion": {"head.hook_actions", "expert.hook_clean_actions"},
    "openvla_oft": set(),
    "openvla": {"head.hook_actions", "head.hook_action_tokens"},
    "openvla_oft/parallel": {"head.hook_actions", "head.hook_action_tokens"},
}


@unchecked_shapes()
@pytest.mark.parametrize("name", PREDICTION)
def test_training_reaches_the_parameters_that_acting_reaches(name: str) -> None:
    case, reached = make_case(name), []
    for result in (lambda: case.loss(None, case.draws(0)), lambda: case.model.sample_actions(case.inputs)):
        case.model.net.zero_grad()
        result().sum().backward()
        reached.append({name for name, each in case.model.net.named_parameters() if each.grad is not None})
    assert reached[0] >= reached[1]


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_padded_steps_do_not_count(name: str) -> None:
    """The mean of the tokens' cross-entropies, of those that count; the stop token is the last step's."""
    case = make_case(name)
    spec, net = case.model.spec, case.model.net
    assert isinstance(spec, LanguageVLASpec)
    readout, steps = spec.readout, case.actions.shape[1]
    valid = torch.ones(3, steps, dtype=torch.bool)
    valid[0, steps - 1 :], valid[1] = False, False
    ids = net.head.encode(case.actions)
    answer = torch.cat([ids, torch.full((3, 1), spec.prompt.stop)], dim=1)
    more = {"n_more": 1} if readout.kind == "parallel" else {}
    given = replace(case.inputs, action_tokens=None if more else answer)
    with torch.no_grad():
        log_p = net.token_logits(given, **more).log_softmax(-1)
        losses = case.loss(valid)
    each = -log_p.gather(2, answer[..., None])[..., 0]
    n = (steps - 1) * readout.d_action
    assert_close(losses[0], each[0, :n].sum() / max(n, 1))
    assert losses[1] == 0
    assert_close(losses[2], each[2].mean())
    # the ids decode to the centres of the bins that they were made of
    assert (net.head(ids) - case.actions).abs().max() <= 1 / (readout.n_bins - 1) + 1e-6
    ends = torch.tensor([-2.0, -1.0, 1.0, 2.0]).expand(1, steps, 4)
    n_ids = (spec.vlm.d_vocab or 0) - readout.n_padding_ids
    assert net.head.encode(ends)[0, :4].tolist() == [n_ids - 1] * 2 + [n_ids - readout.n_bins] * 2


@unchecked_shapes()
def test_targets_of_another_shape_are_refused(case: Case) -> None:
    _, steps, width = case.actions.shape
    for wrong in (case.actions[:2], case.actions[:, 1:], case.actions[..., 1:]):
        with pytest.raises(ValueError, match=rf"target actions must be \[3, {steps}, {width}\]"):
            case.model.training_loss(case.inputs, wrong)
    with pytest.raises(ValueError, match=rf"valid must be \[3, {steps}\]"):
        case.loss(torch.ones(3, steps - 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="valid must be boolean"):
        case.loss(torch.ones(3, steps))
    with pytest.raises(ValueError, match="n_draws must be 1 or more"):
        case.loss(n_draws=0)
    features = case.model.net.vision_features(case.inputs)
    for wrong in (features[:2], features[..., 1:]):
        with pytest.raises(ValueError, match="features must be"):
            case.model.training_loss(replace(case.inputs, features=wrong), case.actions)
    with pytest.raises(ValueError, match="neither images nor vision features"):
        case.model.training_loss(replace(case.inputs, images=None), case.actions)
    assert case.model.run_state.denoise_step is None


def test_draws_are_checked() -> None:
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"must be in 0..1, got -1..0.5"):
        Draws(torch.tensor([-1.0, 0.5]), device).beta(1.5, (2,))
    with pytest.raises(ValueError, match=r"noise must be \[3\]"):
        Draws(torch.zeros(2), device).uniform((3,))
    with pytest.raises(ValueError, match=r"integers 0..9 \[2\]"):
        Draws(torch.tensor([0, 10]), device).integers(10, (2,))
    torch.manual_seed(0)
    drawn = Draws(None, device).beta(1.5, (20_000,))
    # mean and variance of Beta(1.5, 1)
    assert abs(drawn.mean() - 0.6) < 0.01 and abs(drawn.var() - 0.0686) < 0.003
    assert Draws(None, device).integers(3, (100,)).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["pi0_fast", "vqbet"])
def test_models_that_are_not_trained_on_chunks_of_actions_say_so(name: str) -> None:
    model = make_model(name, seed=0)
    obs = make_observation()
    images = {camera: obs.images["agent"] for camera in model.spec.features.cameras}
    inputs = model.prepare(replace(obs, images=images, state=torch.randn(2, model.spec.features.d_state)))
    with pytest.raises(TypeError, match="no training objective on chunks of actions"):
        model.training_loss(inputs, torch.zeros(2, 8, model.spec.features.d_action))
    # their vision features can be kept all the same
    kept = replace(inputs, features=model.net.vision_features(inputs), images=None)
    torch.manual_seed(0)
    expected = model.net.sample_actions(inputs, Draws(None, torch.device("cpu")), model.run_state)
    torch.manual_seed(0)
    assert torch.equal(model.net.sample_actions(kept, Draws(None, torch.device("cpu")), model.run_state), expected)
