"""What every family's network offers, so that hooks, rollouts and tools need not know which one they drive."""

import re
from collections.abc import Iterable, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vla.hooks.point import Run
from hooked_vla.inputs import Draws, ModelInputs, Segments


class Network(nn.Module):
    """A policy network without pre- and postprocessing.

    Its direct children are the pathways of hooks/names.py; the first parameters of a child's `blocks` give the
    dtype of that pathway's stream.
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
