"""What every family's network offers, so that hooks, rollouts and tools need not know which one they drive."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_vla.components.action_head import SamplingHead
from hooked_vla.components.losses import check_targets, mean_of_draws, mean_of_steps
from hooked_vla.components.vit import ViT
from hooked_vla.hooks.point import Run, SegmentTable
from hooked_vla.inputs import Draws, ModelInputs, Segments


class Network(nn.Module):
    """A policy network without pre- and postprocessing.

    Its direct children are the pathways of hooks/names.py; the first parameters of a child's `blocks` give the
    dtype of that pathway's stream.

    Training with a frozen vision tower runs it once: keep what `vision_features` returns, and give it back in
    `inputs.features`, in place of the images.
    """

    @property
    def n_denoise_steps(self) -> int:
        """How often what runs repeatedly does so per action chunk: the expert, or `decode`; 1 where it runs once."""
        raise NotImplementedError

    @property
    def dead_ends(self) -> Sequence[str]:
        """Names and globs of the hook points whose values reach no action."""
        raise NotImplementedError

    def sample_actions(self, inputs: ModelInputs, draws: Draws, run: Run) -> Float[Tensor, "batch step d_padded"]:
        """Normalised actions at the network's own width; random numbers come from `draws` only, and a loop over
        denoise steps keeps `run.denoise_step` up to date (None outside the loop)."""
        raise NotImplementedError

    def training_loss(
        self,
        inputs: ModelInputs,
        actions: Float[Tensor, "batch step d_action"],
        valid: Bool[Tensor, "batch step"] | None,
        draws: Draws,
        run: Run,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """Each row's loss under the model's own published objective, on the forward code that acting runs.

        actions: normalised targets, as wide as the robot's actions and as long as the network's chunk; what the
        network has besides is filled as the public code fills it. valid: which steps count (None: all); what is
        predicted at others does not. A row's loss is the mean over its own steps: code that averages a padded batch
        at once weighs rows by how many they have. draws: noise, then time, or what the objective draws instead.
        n_draws: the loss is the mean over so many draws, one after the other; what does not depend on them is computed
        once, what does sees the batch so many times over. Where nothing is drawn it changes nothing.
        Outside every loop: `run.denoise_step` stays None. Dropout is no part of the objective here.
        Raises ValueError for targets of another shape, TypeError for a model that is not trained on action chunks.
        """
        raise TypeError(f"{type(self).__name__} has no training objective on chunks of actions")

    def vision_features(self, inputs: ModelInputs) -> Float[Tensor, "batch *place d_vision"]:
        """What the vision tower makes of the images, before anything that is trained with the policy reads it; or
        `inputs.features`, if they are given.

        The axes are the images' own up to the camera, then a place axis, or rows and columns where the connector
        reads a grid.
        Raises ValueError when there is nothing to see, or when features do not belong to these inputs.
        """
        if inputs.features is None:
            return self.see(inputs)
        given, (rows, width) = inputs.features, (inputs.batch_size, self.d_features)
        if given.shape[0] != rows or given.shape[-1] != width:
            raise ValueError(
                f"features must be [{rows}, ..., {width}] (batch, ..., d_vision) as vision_features makes them, got "
                f"{list(given.shape)}"
            )
        # they may be kept at less precision
        return given.to(next(self.get_submodule("connector").parameters()).dtype)

    @property
    def d_features(self) -> int:
        """Width of `vision_features`."""
        raise NotImplementedError

    def see(self, inputs: Any) -> Float[Tensor, "batch camera *place d_vision"]:
        """Run the vision tower on the images, of which each row has as many as there are cameras."""
        features = self.get_submodule("vision")(rearrange(pixels(inputs), "b n ... -> (b n) ..."))
        return rearrange(features, "(b n) ... -> b n ...", n=len(inputs.cameras))

    def generate_action_tokens(
        self, inputs: ModelInputs, max_new_tokens: int | None, run: Run
    ) -> Int[Tensor, "batch token"]:
        """Ids of the tokens that the model generates; None: as many as an action chunk takes.

        Raises TypeError for a network that does not generate tokens.
        """
        raise TypeError(f"{type(self).__name__} does not generate tokens: its actions come from `sample_actions`")

    def segments(self, inputs: ModelInputs) -> Mapping[str, Segments]:
        """Token segments of every stream; a pathway's own stream has its name."""
        raise NotImplementedError

    @contextmanager
    def inputs_replaced(self, make_inputs: Callable[[], ModelInputs], run: Run) -> Iterator[None]:
        """For the block, hook points know the segments of other inputs than the run began with."""

        def make() -> dict[str, Segments]:
            device = next(self.parameters()).device
            return {stream: each.to(device) for stream, each in self.segments(make_inputs()).items()}

        outer, run.segments = run.segments, SegmentTable(make)
        try:
            yield
        finally:
            run.segments = outer


class ExpertNetwork(Network):
    """A network whose prefix runs once, and whose expert then runs on a noisy chunk, again and again when acting."""

    spec: Any
    head: SamplingHead
    expert: Any

    @property
    def n_denoise_steps(self) -> int:
        return self.head.n_steps

    def prefill(self, inputs: Any) -> Any:
        """What the expert reads, the same at every denoise step; its `repeat(n)` is that of n batches in a row."""
        raise NotImplementedError

    def sample_actions(self, inputs: Any, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        """The prefix once, then the expert at every denoise step; one draw, the starting noise."""
        noise = draws.normal((inputs.batch_size, self.head.chunk, self.head.d_action))
        reads = self.prefill(inputs)
        return self.head(noise, lambda x, time: self.expert(x, time, reads), run)

    def training_loss(
        self,
        inputs: Any,
        actions: Float[Tensor, "batch chunk d_action"],
        valid: Bool[Tensor, "batch chunk"] | None,
        draws: Draws,
        run: Run,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """As Network's; drawn: noise [batch chunk d_network], then what `head.draw_time` draws, and so for each draw.

        The prefix runs once a row, and the expert on every draw.
        """
        batch, chunk = inputs.batch_size, self.head.chunk
        check_targets(actions, valid, (batch, chunk, self.spec.features.d_action), n_draws)
        shape = (batch, chunk, self.head.d_action)
        drawn = [(draws.normal(shape), self.head.draw_time(draws, batch)) for _ in range(n_draws)]
        noise, time = (torch.cat(each) for each in zip(*drawn, strict=True))
        reads = self.prefill(inputs)
        if n_draws > 1:
            reads, actions = reads.repeat(n_draws), repeat(actions, "b c d -> (n b) c d", n=n_draws)
            valid = None if valid is None else repeat(valid, "b c -> (n b) c", n=n_draws)
        with self.inputs_replaced(lambda: inputs.rows(list(range(batch)) * n_draws), run):
            losses = self.head.losses(actions, noise, time, lambda x, t: self.expert(x, t, reads))
        return mean_of_draws(mean_of_steps(losses, valid), n_draws)


def pixels(inputs: Any) -> Tensor:
    """The images of the inputs.

    Raises ValueError when there are none.
    """
    if inputs.images is None:
        raise ValueError("the inputs have neither images nor vision features")
    return inputs.images


def count_patches(vision: ViT, inputs: Any) -> int:
    """Patches of each image that the tower reads, or has read."""
    if inputs.features is not None:
        return inputs.features.shape[2]
    return math.prod(vision.grid(*pixels(inputs).shape[-2:]))


def expand_ties(tied: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """A spec's ties for the parameters `names`: "{}" in both names of a tie stands for the same number."""
    patterns = [(re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), other) for name, other in tied.items()]
    found = {}
    for name in names:
        for pattern, other in patterns:
            if match := pattern.fullmatch(name):
                found[name] = other.format(*match.groups())
    return found


def share_parameters(net: nn.Module, ties: Mapping[str, str]) -> None:
    """Make each parameter the same object as the one that it is tied to."""
    for name, other in ties.items():
        module, leaf = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        module.register_parameter(leaf, net.get_parameter(other))
