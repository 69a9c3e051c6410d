"""How far apart two runs are: in their actions, in where the end effector goes, and in what a discrete head says.

Everything takes whole tensors with any leading axes, and is differentiable where that makes sense, so that the same
metric serves a table of episodes and a gradient. Actions are [... step d_action]; which of their channels move the end
effector, and which are the gripper, is said by an `ActionLayout`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Cosine = Literal["per_step", "flat", "mean_action", "eef_delta"]
# what three-way classes call "ambiguous": Action Atlas (arXiv 2603.19233)
MARGIN = 0.05
SOURCE, DESTINATION, AMBIGUOUS = "source", "destination", "ambiguous"
# shorter vectors have no direction worth comparing
_SHORTEST = 1e-6


@dataclass(frozen=True)
class ActionLayout:
    """What the channels of an action and of a state are.

    width: channels of an action. position: those of it that move the end effector. gripper: those that grip, which
    cosines leave out. metres: how far one unit of a position channel moves the target, for delta actions. limit: the
    environment clips actions to -limit..limit.
    state_position: entries of the proprioceptive state that are the end effector's place in metres.
    Raises ValueError for channels outside 0..width-1, or a channel that both moves and grips.
    """

    width: int
    position: tuple[int, ...]
    gripper: tuple[int, ...]
    metres: float
    limit: float
    state_position: tuple[int, ...]

    def __post_init__(self) -> None:
        if bad := [each for each in (*self.position, *self.gripper) if not 0 <= each < self.width]:
            raise ValueError(f"channels {bad} are not among the {self.width} of an action")
        if both := set(self.position) & set(self.gripper):
            raise ValueError(f"channels {sorted(both)} cannot both move the end effector and grip")

    @property
    def moving(self) -> tuple[int, ...]:
        """All channels but the gripper's."""
        return tuple(each for each in range(self.width) if each not in self.gripper)


def action_cosine(
    first: Float[Tensor, "*batch step d_action"],
    second: Float[Tensor, "*batch steps d_action"],
    layout: ActionLayout,
    preset: Cosine = "per_step",
) -> Float[Tensor, "*batch"]:
    """Cosine of two action sequences, without the gripper; the studies of VLAs use four, and call each "the" cosine.

    per_step, ours: mean over time of each step's cosine, of normalised actions. flat: of all steps as one vector, in
    which large moves weigh more. mean_action: of the actions' means over time, which forgets their order. eef_delta:
    mean over time of the cosine of the position channels alone, of actions in the robot's units.
    Where a vector is shorter than 1e-6 in either run, that step is left out; NaN where nothing is left.
    Raises ValueError for shapes that differ or are not the layout's, or another preset.
    """
    _check(first, second, layout)
    if preset not in get_args(Cosine):
        raise ValueError(f"unknown preset {preset!r} of the action cosine; presets: {list(get_args(Cosine))}")
    channels = list(layout.position if preset == "eef_delta" else layout.moving)
    a, b = first[..., channels], second[..., channels]
    if preset == "flat":
        a, b = a.flatten(-2).unsqueeze(-2), b.flatten(-2).unsqueeze(-2)
    elif preset == "mean_action":
        a, b = a.mean(-2, keepdim=True), b.mean(-2, keepdim=True)
    lengths = a.norm(dim=-1), b.norm(dim=-1)
    counted = (lengths[0] > _SHORTEST) & (lengths[1] > _SHORTEST)
    # a stand-in keeps the gradient of uncounted steps at 0 instead of NaN
    product = torch.where(counted, lengths[0] * lengths[1], 1.0)
    cosines = torch.where(counted, (a * b).sum(-1) / product, 0.0)
    return cosines.sum(-1) / counted.sum(-1)


def action_l2(
    first: Float[Tensor, "*batch step d_action"],
    second: Float[Tensor, "*batch steps d_action"],
    layout: ActionLayout,
) -> Float[Tensor, "*batch"]:
    """Mean over time of the Euclidean distance of normalised actions, without the gripper.

    Raises ValueError for shapes that differ or are not the layout's.
    """
    _check(first, second, layout)
    channels = list(layout.moving)
    return (first[..., channels] - second[..., channels]).norm(dim=-1).mean(-1)


def relative_l2(
    edited: Float[Tensor, "*batch step d_action"],
    clean: Float[Tensor, "*batch step d_action"],
    source: Float[Tensor, "*batch step d_action"],
) -> Float[Tensor, "*batch"]:
    """‖edited - clean‖ ÷ ‖source - clean‖ over a whole chunk: 0 is the clean run, 1 as far away as the source's.

    Infinite or NaN where source and clean are one.
    """
    return (edited - clean).flatten(-2).norm(dim=-1) / (source - clean).flatten(-2).norm(dim=-1)


def recovery(
    edited: Float[Tensor, "*batch step d_action"],
    clean: Float[Tensor, "*batch step d_action"],
    source: Float[Tensor, "*batch step d_action"],
) -> Float[Tensor, "*batch"]:
    """How far an edit goes from the clean run's chunk to the source's: 0 the clean one, 1 the source's.

    The edit's change projected on the difference of the two, ÷ its length; linear in the edited actions. NaN where
    source and clean are one.
    """
    way = (source - clean).flatten(-2)
    return ((edited - clean).flatten(-2) * way).sum(-1) / way.square().sum(-1)


def integrate_actions(
    actions: Float[Tensor, "*batch step d_action"],
    layout: ActionLayout,
    start: Float[Tensor, "*batch position"] | None = None,
) -> Float[Tensor, "*batch step position"]:
    """Where delta actions (in the robot's units) would lead the end effector, in metres, after each step.

    start: where it is before the first; None: what comes out is the displacement. A target that is followed exactly is
    assumed; where states were recorded, use them instead.
    Raises ValueError for actions that are not as wide as the layout.
    """
    _check(actions, actions, layout)
    moves = actions[..., list(layout.position)].clamp(-layout.limit, layout.limit)
    path = layout.metres * moves.cumsum(-2)
    return path if start is None else path + start.unsqueeze(-2)


def displacement(
    first: Float[Tensor, "*batch step position"], second: Float[Tensor, "*batch steps position"]
) -> Float[Tensor, "*batch"]:
    """Mean over time of the distance between two paths of the end effector, metres: integrated or from states.

    Raises ValueError for paths of different shapes; cut them to their common steps first.
    """
    if first.shape != second.shape:
        raise ValueError(f"paths must have one shape, got {list(first.shape)} and {list(second.shape)}")
    return (first - second).norm(dim=-1).mean(-1)


def target_distance(
    places: Float[Tensor, "*batch position"], target: Float[Tensor, "*#batch position"]
) -> Float[Tensor, "*batch"]:
    """Distance of places to a target, metres. Where the target is a place on the table, give x and y alone."""
    return (places - target).norm(dim=-1)


def logit_difference(
    logits: Float[Tensor, "*batch token vocab"],
    right: Int[Tensor, "*#batch token"],
    wrong: Int[Tensor, "*#batch token"],
) -> Float[Tensor, "*batch"]:
    """Mean over tokens of logit[right] - logit[wrong], for heads that say actions as tokens.

    right, wrong: ids of the two runs' tokens. Tokens on which both agree say nothing, and are left out; NaN where they
    agree on all.
    Raises ValueError for ids outside the vocabulary.
    """
    vocab = logits.shape[-1]
    for name, ids in (("right", right), ("wrong", wrong)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(f"{name}: ids must be in 0..{vocab - 1}, got {int(ids.min())}..{int(ids.max())}")
    right, wrong = (ids.expand(logits.shape[:-1]) for ids in (right, wrong))
    gap = logits.gather(-1, right.unsqueeze(-1)) - logits.gather(-1, wrong.unsqueeze(-1))
    differ = right != wrong
    return (gap.squeeze(-1) * differ).sum(-1) / differ.sum(-1)


def follows_source(cos_src: Float[Tensor, "*batch"], cos_dst: Float[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    """The lenient definition of an override: any closer to the source's actions than to the destination's."""
    return cos_src > cos_dst


def three_way(
    cos_src: Float[Tensor, " episode"], cos_dst: Float[Tensor, " episode"], margin: float = MARGIN
) -> list[str]:
    """The strict definition: "source" or "destination" where one cosine is larger by more than the margin, else
    "ambiguous"."""
    lead = (cos_src - cos_dst).tolist()
    return [SOURCE if each > margin else DESTINATION if each < -margin else AMBIGUOUS for each in lead]


def endpoint_share(
    end: Float[Tensor, "*batch position"],
    source_end: Float[Tensor, "*batch position"],
    destination_end: Float[Tensor, "*batch position"],
) -> Float[Tensor, "*batch"]:
    """Where an episode ended, between the ends of the destination's (0) and the source's (1) own episodes.

    distance to the destination's end ÷ the sum of both distances; NaN where all three are one place. This is the
    headline: cosines can be high between runs that end far apart.
    """
    to_source, to_destination = target_distance(end, source_end), target_distance(end, destination_end)
    return to_destination / (to_source + to_destination)


def common_steps(first: Float[Tensor, " m *rest"], second: Float[Tensor, " n *rest"]) -> tuple[Tensor, Tensor]:
    """Two sequences of steps, each cut to the length of the shorter one."""
    n = min(len(first), len(second))
    return first[:n], second[:n]


def _check(first: Tensor, second: Tensor, layout: ActionLayout) -> None:
    if first.shape != second.shape or first.ndim < 2 or first.shape[-1] != layout.width:
        raise ValueError(
            f"actions must be two of one shape [... step {layout.width}], got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
