"""Actions as the last ids of a vocabulary, each of which stands for a bin of -1..1."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vla.hooks.point import HookPoint


class TokenHead(nn.Module):
    """Token ids to the centres of their bins: id n_ids - 1 is the first bin, n_ids - 2 the second, and so on.

    n_bins edges make n_bins - 1 bins; ids of no bin take the nearest one (OpenVLA: prismatic/vla/action_tokenizer.py).
    """

    def __init__(self, n_ids: int, n_bins: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.n_ids, self.n_bins, self.chunk, self.d_action, self.n_tokens = (
            n_ids, n_bins, chunk, d_action, chunk * d_action,
        )  # fmt: skip
        self.hook_action_tokens = HookPoint("batch n_tokens", dtype="int64")
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def edges(self, device: torch.device) -> Float[Tensor, " n_bins"]:
        return torch.linspace(-1, 1, self.n_bins, dtype=torch.float64, device=device)

    def encode(self, actions: Float[Tensor, "batch chunk d_action"]) -> Int[Tensor, "batch n_tokens"]:
        """Ids of the bins that actions fall in, a step's channels next to each other; what is outside -1..1 counts
        as the end, and 1 itself as a bin of its own (numpy.digitize in action_tokenizer.py)."""
        flat = rearrange(actions, "b c d -> b (c d)").double().clamp(-1, 1)
        return self.n_ids - torch.bucketize(flat, self.edges(actions.device), right=True)

    def forward(self, tokens: Int[Tensor, "batch n_tokens"]) -> Float[Tensor, "batch chunk d_action"]:
        edges = self.edges(tokens.device)
        centres = ((edges[:-1] + edges[1:]) / 2).to(torch.float32)
        bins = (self.n_ids - self.hook_action_tokens(tokens) - 1).clamp(0, self.n_bins - 2)
        return self.hook_actions(rearrange(centres[bins], "b (c d) -> b c d", c=self.chunk))
