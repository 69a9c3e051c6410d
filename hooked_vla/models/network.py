"""What every family's network offers, so that hooks, rollouts and tools need not know which one they drive."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
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
        """How often the expert runs per action chunk; 1 where it runs once."""
        raise NotImplementedError

    @property
    def dead_ends(self) -> Sequence[str]:
        """Names and globs of the hook points whose values reach no action."""
        raise NotImplementedError

    def sample_actions(self, inputs: ModelInputs, draws: Draws, run: Run) -> Float[Tensor, "batch step d_padded"]:
        """Normalised actions at the network's own width; random numbers come from `draws` only, and a loop over
        denoise steps keeps `run.denoise_step` up to date (None outside the loop)."""
        raise NotImplementedError

    def segments(self, inputs: ModelInputs) -> Mapping[str, Segments]:
        """Token segments of every stream; a pathway's own stream has its name."""
        raise NotImplementedError
