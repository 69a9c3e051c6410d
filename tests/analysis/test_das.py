"""Distributed alignment search: it turns to a planted plane, and its swaps are those of the declarative edits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from public_checkpoints import make_observation
from torch import Tensor, nn

from hooked_vla import HookedVLA
from hooked_vla.analysis.das import Interchange, Pairs, learn_subspace
from hooked_vla.analysis.subspaces import Subspace, random_subspace
from hooked_vla.hooks import HookPoint
from hooked_vla.hooks.model import HookedModel
from hooked_vla.inputs import Actions, ModelInputs, Segments
from hooked_vla.interventions import Patch, SubspacePatch

D, SITE = 6, "vlm.hook_tokens"
GENERATOR = torch.Generator().manual_seed(0)
TURN = torch.linalg.qr(torch.randn(D, D, generator=GENERATOR))[0]
PLANE = torch.linalg.qr(torch.randn(D, 2, generator=GENERATOR))[0].T
REST = torch.randn(D, 3, generator=GENERATOR)


@dataclass(frozen=True)
class Inputs(ModelInputs):
    x: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.x)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(TURN.clone())
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_tokens(x @ self.turn)


class Net(nn.Module):
    """Actions follow a plane of two turned tokens, and, apart from it, the rest of them; a third token does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = Stream()

    def forward(self, x: Tensor) -> Tensor:
        h = self.vlm(x)[:, :2].mean(1)
        inside = h @ PLANE.T
        rest = (h - inside @ PLANE) @ REST
        return (
            torch.stack([torch.tanh(2 * inside), inside[:, :1] * inside], dim=1).repeat(1, 1, 2)[..., :3]
            + rest[:, None]
        )


class Toy(HookedModel):
    n_denoise_steps = 1
    dead_ends = ()

    def prepare_raw(self, obs: Any, unnorm_key: str | None = None) -> tuple[Inputs, bool]:
        return obs, False

    def act(self, inputs: Inputs, noise: Any, raw: bool, unnorm_key: str | None = None) -> Actions:
        actions = self.net(inputs.x)
        return Actions(actions, actions)

    def segments(self, inputs: Inputs) -> Mapping[str, Segments]:
        return {"vlm": Segments.from_spans([("language", 2), ("state", 1)], inputs.batch_size)}


def planted_pairs(n: int, seed: int) -> Pairs:
    """Base, source, and the base with the source's part in the plane."""
    x = torch.randn(2, n, 3, D, generator=torch.Generator().manual_seed(seed))
    base, source = x @ TURN
    swapped = base + (source - base) @ PLANE.T @ PLANE
    return Pairs(Inputs(x[0]), Inputs(x[1]), Inputs(swapped @ TURN.T), [])


def test_the_planted_plane_is_found_and_holds_on_other_pairs() -> None:
    model = Toy(Net())
    train, test = (Interchange(model, planted_pairs(n, seed), SITE, "language") for n, seed in ((64, 1), (40, 2)))
    planted = Subspace(PLANE, torch.zeros(D), "planted")
    assert test.effect(planted).mean() > 0.999
    learned = learn_subspace(train, 2, steps=150, batch=64, lr=0.1, seed=0)
    assert learned.subspace.overlap(planted) > 0.98
    assert learned.losses[-1] < 0.05 < learned.losses[0]
    assert test.effect(learned.subspace).mean() > 0.95
    assert test.effect(random_subspace(D, 2, 0)).mean() < 0.6
    # all dimensions bring the rest of the source along
    assert not torch.allclose(test.run(None), test.target, atol=0.1)
    again = learn_subspace(train, 2, steps=3, batch=64, lr=0.1, seed=0)
    assert again.losses == learned.losses[:1] + again.losses[1:] and model.net.vlm.turn.grad is None
    assert model.net.vlm.turn.requires_grad


def test_one_search_serves_a_curve_and_may_begin_somewhere() -> None:
    train = Interchange(Toy(Net()), planted_pairs(64, 1), SITE, "language")
    start = random_subspace(D, 4, 3)
    learned = learn_subspace(train, [1, 2, 4], steps=150, batch=64, lr=0.1, start=start)
    effects = [float(train.effect(learned.subspace, k).mean()) for k in (1, 2, 4)]
    assert learned.subspace.k == 4 and effects[0] < effects[1] and effects[1] > 0.9
    untouched = learn_subspace(train, 4, steps=1, lr=1e-9, start=start).subspace
    assert torch.allclose(untouched.basis, start.basis, atol=1e-5)


def model_pairs(n: int) -> Pairs:
    model = tiny()
    base, source = make_observation(n, instruction=["red"] * n), make_observation(n, 1, instruction=["tan"] * n)
    other = replace(base, instruction=["tan"] * n)
    draw = torch.randn(n, 8, 8, generator=torch.Generator().manual_seed(3))
    return Pairs(model.prepare(base), model.prepare(source), model.prepare(other), [draw])


_MODEL: list[HookedVLA] = []


def tiny() -> HookedVLA:
    if not _MODEL:
        _MODEL.append(HookedVLA.from_spec("smolvla", "tiny", seed=0))
    return _MODEL[0]


@pytest.mark.parametrize("site", ["vlm.blocks.0.hook_resid_post", "expert.blocks.1.hook_resid_post"])
def test_swaps_are_those_of_the_edits(site: str) -> None:
    """At a site that runs once a chunk, and at one that runs at every denoise step."""
    model, pairs = tiny(), model_pairs(3)
    tokens = "language" if site.startswith("vlm") else None
    swaps = Interchange(model, pairs, site, tokens, rows=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.source, site, pairs.noise)
        source = cache[site].segment("language") if tokens else cache[site]
        basis = random_subspace(swaps.d, 3, 0).basis.float()
        assert torch.allclose(swaps.clean, model(pairs.base, pairs.noise).normalized, atol=1e-5)
        for edit, ran in (
            (SubspacePatch(site, source, basis, tokens=tokens), swaps.run(basis)),
            (Patch(site, source, tokens=tokens), swaps.run(None)),
        ):
            expected = model(pairs.base, pairs.noise, edits=[edit]).normalized
            assert torch.allclose(ran, expected, atol=1e-5) and not torch.allclose(ran, swaps.clean, atol=1e-4)
        assert torch.equal(swaps.run(basis, [2]), swaps.run(basis)[2:])
        own, theirs, keys = swaps.examples()
        assert len(own) == len(theirs) == len(keys) == int(swaps.mask.sum()) and keys[:2] == [(0, 0), (0, 1)]
        assert torch.allclose(theirs[0], source[-1, 0, 0] if source.ndim == 4 else source[0, 0], atol=1e-5)


def test_gradients_reach_the_basis_alone() -> None:
    model, pairs = tiny(), model_pairs(2)
    swaps = Interchange(model, pairs, "vlm.blocks.0.hook_resid_post")
    asked = [parameter.requires_grad for parameter in model.parameters()]
    learned = learn_subspace(swaps, 2, steps=4, batch=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point.listeners for point in model.points.values())
    assert torch.allclose(learned.subspace.basis @ learned.subspace.basis.T, torch.eye(2).double(), atol=1e-5)
    assert learned.losses[0] != learned.losses[-1]


def test_what_cannot_be_swapped_is_said() -> None:
    model, pairs = Toy(Net()), planted_pairs(4, 0)
    with pytest.raises(ValueError, match=r"have \[4, 4, 3\] rows"):
        Pairs(pairs.base, pairs.source, pairs.source.rows([0, 1, 2]), [])
    with pytest.raises(ValueError, match=r"pairs \[0, 1, 2, 3\] is what the base does anyway"):
        Interchange(model, Pairs(pairs.base, pairs.source, pairs.base, []), SITE)
    with pytest.raises(KeyError, match="no token segment 'words'"):
        Interchange(model, pairs, SITE, "words")
    with pytest.raises(KeyError, match="no hook point matches 'vlm.hook_token'"):
        Interchange(model, pairs, "vlm.hook_token")
    swaps = Interchange(model, pairs, SITE)
    for make, message in (
        (lambda: learn_subspace(swaps, 7), r"sizes \[7\]: vlm.hook_tokens holds 6"),
        (lambda: learn_subspace(swaps, 2, steps=0), "must be positive"),
        (lambda: learn_subspace(swaps, 3, start=random_subspace(D, 2, 0)), "start has 2 of 6 dimensions: 3 of 6"),
        (lambda: swaps.effect(random_subspace(4, 1, 0)), "holds 6 numbers a token, the subspace is of 4"),
        (lambda: Interchange(tiny(), model_pairs(1), "vision.blocks.0.hook_resid_post"), "swaps need batch, then"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_source_with_other_tokens_is_named() -> None:
    model, pairs = tiny(), model_pairs(2)
    longer = model.prepare(make_observation(2, 1, ["tan", "put the tan block down"]))
    pairs = replace(pairs, source=longer)
    with pytest.raises(ValueError, match="pair 1: the source has .* tokens of language at vlm.blocks.0"):
        Interchange(model, pairs, "vlm.blocks.0.hook_resid_post", "language")
