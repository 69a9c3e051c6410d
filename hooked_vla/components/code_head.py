"""Actions as codes: a residual quantiser's codes are drawn from predicted logits, decoded, and corrected by offsets."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Draws
from hooked_vla.spec import CodeSpec


class Codebook(nn.Module):
    """One codebook's vectors; the counts that training keeps beside them are buffers that nothing reads here."""

    embed: Tensor

    def __init__(self, n_codes: int, d_code: int) -> None:
        super().__init__()
        self.n_codes = n_codes
        self.register_buffer("embed", torch.randn(1, n_codes, d_code))
        self.register_buffer("embed_avg", torch.zeros(1, n_codes, d_code))
        self.register_buffer("cluster_size", torch.zeros(1, n_codes))
        self.register_buffer("initted", torch.ones(1))
        self.hook_logits = HookPoint("batch seq n_codes")
        self.hook_code = HookPoint("batch seq n_codes")

    def one_hot(self, chosen: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq n_codes"]:
        return self.hook_code(functional.one_hot(chosen, self.n_codes).to(self.embed.dtype))


class ReluLayer(nn.Module):
    """relu(x W + b)."""

    def __init__(self, d_in: int, d_mlp: int) -> None:
        super().__init__()
        self.d_mlp = d_mlp
        self.linear = nn.Linear(d_in, d_mlp)
        self.hook_pre = HookPoint("batch seq d_mlp")
        self.hook_post = HookPoint("batch seq d_mlp")

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_mlp"]:
        return self.hook_post(self.hook_pre(self.linear(x)).relu())


class CodeDecoder(nn.Module):
    """Two hidden layers, then one linear map."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ReluLayer(d_in, d_hidden), ReluLayer(d_hidden, d_hidden)])
        self.out = nn.Linear(d_hidden, d_out)

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class CodeHead(nn.Module):
    """Outputs of the action queries to action chunks, of which the present step's is handed out.

    present: which query is the present step's. All queries draw their codes, as in the public implementation.
    """

    def __init__(self, spec: CodeSpec, d_in: int, present: int, d_action: int) -> None:
        super().__init__()
        self.spec, self.present, self.chunk, self.d_action = spec, present, spec.chunk, d_action
        self.d_chunk, self.d_code = spec.chunk * d_action, spec.d_code
        if spec.sequential:
            self.first_proj = nn.Linear(d_in, spec.n_codes)
            self.second_proj = nn.Linear(d_in + spec.n_codes, spec.n_codes)
        else:
            self.logits_proj = nn.Linear(d_in, spec.n_codebooks * spec.n_codes)
        self.offsets_proj = nn.Linear(d_in, spec.n_codebooks * spec.n_codes * self.d_chunk)
        self.codebooks = nn.ModuleList(Codebook(spec.n_codes, spec.d_code) for _ in range(spec.n_codebooks))
        self.decoder = CodeDecoder(spec.d_code, spec.d_hidden, self.d_chunk)
        self.hook_code_sum = HookPoint("batch seq d_code")
        self.hook_decoded = HookPoint("batch seq d_chunk")
        self.hook_offset = HookPoint("batch seq d_chunk")
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, x: Float[Tensor, "batch seq d_in"], draws: Draws) -> Float[Tensor, "batch chunk d_action"]:
        x = x.to(self.offsets_proj.weight.dtype)
        codes = self._draw_one_by_one(x, draws) if self.spec.sequential else self._draw_together(x, draws)
        vectors = [code @ self._book(i).embed[0] for i, code in enumerate(codes)]
        decoded = self.hook_decoded(self.decoder(self.hook_code_sum(torch.stack(vectors).sum(0))))
        offsets = rearrange(self.offsets_proj(x), "b s (g c w) -> b s g c w", g=len(codes), c=self.spec.n_codes)
        offset = torch.einsum("bsgcw,bsgc->bsw", offsets, torch.stack(codes, dim=2))
        chunks = decoded + self.hook_offset(offset)
        present = rearrange(chunks[:, self.present], "b (w a) -> b w a", w=self.chunk)
        return self.hook_actions(present.float())

    def _draw_together(self, x: Float[Tensor, "batch seq d_in"], draws: Draws) -> list[Tensor]:
        """One draw for all codebooks."""
        parts = self.logits_proj(x).chunk(self.spec.n_codebooks, dim=-1)
        logits = [self._book(i).hook_logits(part) for i, part in enumerate(parts)]
        chosen = self._choose(torch.stack(logits, dim=2), draws)
        return [self._book(i).one_hot(each) for i, each in enumerate(chosen.unbind(-1))]

    def _draw_one_by_one(self, x: Float[Tensor, "batch seq d_in"], draws: Draws) -> list[Tensor]:
        """One draw for each of two codebooks, the second knowing the first's."""
        first = self._book(0).hook_logits(self.first_proj(x))
        codes = [self._book(0).one_hot(self._choose(first, draws))]
        second = self._book(1).hook_logits(self.second_proj(torch.cat([x, codes[0]], dim=-1)))
        return [*codes, self._book(1).one_hot(self._choose(second, draws))]

    def _choose(self, logits: Float[Tensor, "*rows n_codes"], draws: Draws) -> Int[Tensor, "*rows"]:
        weights = (logits.float() / self.spec.temperature).softmax(-1)
        return draws.choice(weights.flatten(0, -2)).reshape(logits.shape[:-1])

    def _book(self, number: int) -> Codebook:
        book = self.codebooks[number]
        assert isinstance(book, Codebook)
        return book
