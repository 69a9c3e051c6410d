"""Linear maps that each embodiment (domain) has its own weights for; every row of a batch names its domain."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class DomainLinear(nn.Module):
    """y = x W[e] + b[e] for a row of domain e. W is [domain, d_in, d_out]: input first, unlike nn.Linear.

    flat: W is stored with its last two axes merged, as some public layouts have it.
    """

    def __init__(self, n_domains: int, d_in: int, d_out: int, flat: bool = False) -> None:
        super().__init__()
        self.n_domains, self.d_in, self.d_out = n_domains, d_in, d_out
        shape = (n_domains, d_in * d_out) if flat else (n_domains, d_in, d_out)
        self.W = nn.Parameter(torch.empty(shape).normal_(std=0.02))
        self.b = nn.Parameter(torch.zeros(n_domains, d_out))

    def forward(
        self, x: Float[Tensor, "batch seq d_in"], domain: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch seq d_out"]:
        weight = self.W[domain].view(-1, self.d_in, self.d_out)
        return torch.bmm(x, weight) + self.b[domain][:, None]


class DomainMLP(nn.Module):
    """Two domain linears with a ReLU between them."""

    def __init__(self, n_domains: int, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.layer1 = DomainLinear(n_domains, d_in, d_hidden)
        self.layer2 = DomainLinear(n_domains, d_hidden, d_out)

    def forward(
        self, x: Float[Tensor, "batch seq d_in"], domain: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch seq d_out"]:
        return self.layer2(functional.relu(self.layer1(x, domain)), domain)
