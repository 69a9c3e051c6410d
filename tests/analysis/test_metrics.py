"""Metrics on actions: what each cosine sees and does not, override definitions, and gradients."""

import pytest
import torch
from torch import Tensor

from hooked_vla.analysis.metrics import (
    AMBIGUOUS,
    DESTINATION,
    SOURCE,
    ActionLayout,
    action_cosine,
    action_l2,
    common_steps,
    displacement,
    endpoint_share,
    follows_source,
    integrate_actions,
    logit_difference,
    recovery,
    relative_l2,
    target_distance,
    three_way,
)

LAYOUT = ActionLayout(width=5, position=(0, 1, 2), gripper=(4,), metres=0.03, limit=1.0, state_position=(0, 1, 2))


def chunks(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["per_step", "flat", "mean_action", "eef_delta"])
def test_cosines_are_one_minus_one_and_blind_to_the_gripper(preset) -> None:
    a = chunks(3, 8)
    assert action_cosine(a, 2 * a, LAYOUT, preset) == pytest.approx([1.0] * 3)
    assert action_cosine(a, -a, LAYOUT, preset) == pytest.approx([-1.0] * 3)
    gripped = a.clone()
    gripped[..., 4] = -5 * a[..., 4]
    assert torch.equal(action_cosine(a, gripped, LAYOUT, preset), action_cosine(a, a, LAYOUT, preset))
    other = chunks(3, 8, seed=1)
    single = torch.stack([action_cosine(x, y, LAYOUT, preset) for x, y in zip(a, other, strict=True)])
    assert torch.allclose(action_cosine(a, other, LAYOUT, preset), single)


def test_the_four_cosines_differ_where_their_definitions_do() -> None:
    x, y, turn = (torch.eye(5)[i] for i in (0, 1, 3))
    # one long step that agrees, one short step that does not
    first, second = torch.stack([10 * x, x]), torch.stack([10 * x, y])
    assert float(action_cosine(first, second, LAYOUT)) == pytest.approx(0.5)
    assert float(action_cosine(first, second, LAYOUT, "flat")) == pytest.approx(100 / 101)
    # the same moves in another order
    assert float(action_cosine(torch.stack([x, y]), torch.stack([y, x]), LAYOUT, "mean_action")) == pytest.approx(1)
    assert float(action_cosine(torch.stack([x, y]), torch.stack([y, x]), LAYOUT)) == 0
    # a channel that turns the hand is none of the end effector's moves
    turned = torch.stack([x + turn, x - turn])
    assert float(action_cosine(torch.stack([x, x]), turned, LAYOUT, "eef_delta")) == pytest.approx(1)
    assert float(action_cosine(torch.stack([x, x]), turned, LAYOUT)) == pytest.approx(0.5**0.5)


def test_steps_without_a_direction_are_left_out() -> None:
    a = chunks(4)
    still = a.clone()
    still[2, :4] = 0
    assert float(action_cosine(a, still, LAYOUT)) == pytest.approx(1)
    assert action_cosine(a, torch.zeros_like(a), LAYOUT).isnan()
    still.requires_grad_()
    action_cosine(a, still, LAYOUT).backward()
    assert still.grad is not None and bool(still.grad.isfinite().all())


def test_actions_of_other_shapes_and_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \[\.\.\. step 5\], got \[8, 5\] and \[7, 5\]"):
        action_cosine(chunks(8), chunks(7), LAYOUT)
    with pytest.raises(ValueError, match=r"\[8, 4\]"):
        action_l2(chunks(8)[:, :4], chunks(8)[:, :4], LAYOUT)
    with pytest.raises(ValueError, match=r"channels \[4\] cannot both"):
        ActionLayout(5, (0, 4), (4,), 1.0, 1.0, (0,))
    with pytest.raises(ValueError, match=r"channels \[5\] are not among"):
        ActionLayout(5, (0,), (5,), 1.0, 1.0, (0,))


def test_distances_are_mean_over_time_of_euclidean_ones() -> None:
    a = torch.zeros(2, 5)
    b = a.clone()
    b[0, :2] = torch.tensor([3.0, 4.0])
    b[:, 4] = 7
    assert float(action_l2(a, b, LAYOUT)) == 2.5
    path = torch.tensor([[0.0, 0, 0], [0.3, 0.4, 0]])
    assert float(displacement(path, torch.zeros(2, 3))) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[3, 3\]"):
        displacement(path, torch.zeros(3, 3))
    assert [len(each) for each in common_steps(torch.zeros(4, 3), torch.zeros(7, 3))] == [4, 4]


def test_an_edit_is_placed_between_clean_and_source() -> None:
    clean, source = chunks(3, 8), chunks(3, 8, seed=1)
    assert relative_l2(clean, clean, source) == pytest.approx([0.0] * 3)
    assert relative_l2(source, clean, source) == pytest.approx([1.0] * 3)
    half = clean + 0.5 * (source - clean)
    assert recovery(half, clean, source) == pytest.approx([0.5] * 3, abs=1e-6)
    # sideways: far from the clean run, but no nearer to the source
    way = (source - clean).flatten(1)
    side = chunks(3, 8, seed=2).flatten(1)
    side = side - way * ((side * way).sum(1) / way.square().sum(1))[:, None]
    edited = clean + side.reshape(clean.shape)
    assert recovery(edited, clean, source) == pytest.approx([0.0] * 3, abs=1e-5)
    assert bool((relative_l2(edited, clean, source) > 0.3).all())


def test_delta_actions_are_integrated_as_the_environment_would() -> None:
    actions = torch.tensor([[1.0, 0, 0, 9, 9], [1, -0.5, 0, 9, 9], [4, 0, 0, 9, 9]])
    expected = torch.tensor([[0.03, 0, 0], [0.06, -0.015, 0], [0.09, -0.015, 0]])
    assert torch.allclose(integrate_actions(actions, LAYOUT), expected)
    start = torch.tensor([0.1, 0.2, 0.3])
    assert torch.allclose(integrate_actions(actions, LAYOUT, start), expected + start)
    assert float(target_distance(expected[-1, :2], torch.tensor([0.09, -0.015]))) == pytest.approx(0, abs=1e-7)


def test_logit_differences_count_tokens_on_which_runs_differ() -> None:
    logits = torch.zeros(2, 3, 6)
    logits[0, :, 2], logits[0, :, 5] = torch.tensor([4.0, 9.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    right, wrong = torch.tensor([2, 2, 2]), torch.tensor([5, 2, 5])
    assert logit_difference(logits, right, wrong) == pytest.approx([(3 + 2) / 2, 0.0])
    assert logit_difference(logits, right, right).isnan().all()
    with pytest.raises(ValueError, match=r"wrong: ids must be in 0\.\.5, got 5\.\.7"):
        logit_difference(logits, right, wrong + torch.tensor([0, 5, 0]))


def test_override_definitions_part_where_cosines_are_close() -> None:
    cos_src, cos_dst = torch.tensor([0.92, 0.90, 0.2]), torch.tensor([0.90, 0.80, 0.9])
    assert follows_source(cos_src, cos_dst).tolist() == [True, True, False]
    assert three_way(cos_src, cos_dst) == [AMBIGUOUS, SOURCE, DESTINATION]
    assert three_way(cos_src, cos_dst, margin=0.01) == [SOURCE, SOURCE, DESTINATION]
    ends = torch.tensor([[0.0, 0], [1, 0], [0.25, 0], [0.5, 9]])
    source, destination = torch.tensor([1.0, 0]).expand(4, 2), torch.zeros(4, 2)
    assert endpoint_share(ends, source, destination) == pytest.approx([0.0, 1.0, 0.25, 0.5])
    assert endpoint_share(ends[:1], ends[:1], ends[:1]).isnan()


def test_metrics_have_gradients() -> None:
    edited, clean, source = chunks(2, 8).requires_grad_(), chunks(2, 8, seed=1), chunks(2, 8, seed=2)
    for value in (
        action_cosine(edited, source, LAYOUT), action_l2(edited, source, LAYOUT), recovery(edited, clean, source),
        target_distance(integrate_actions(edited, LAYOUT)[:, -1], torch.zeros(3)),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(value.sum(), edited)
        assert bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0
