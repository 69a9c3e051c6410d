"""What training minimises, by architecture, and what it takes note of: one autoencoder's objective for one batch.

All terms are means over tokens, in normalised units (with token_norm in the model's), so that the gradient of a batch
is the mean of those of its parts, wherever these are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.sae.activations import (
    Code,
    choose,
    choose_in_batch,
    chosen_values,
    decoded,
    jump_relu,
    spread,
    step,
)
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.normalise import of_token

# the threshold of batch_topk is a mean of the least active values of batches; this share of all steps, the last ones,
# count most, because earlier ones are larger
REMEMBERED = 1 / 20


@dataclass
class Terms:
    """One batch. loss: what is minimised; fvu: squared error over the variance that training began with; l0: active
    features of a token, the mean; aux: the AuxK term, unweighted; fired: which features were active."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    aux: Tensor
    fired: Bool[Tensor, " m"]


@dataclass
class Batch:
    """Tokens as the objective needs them: normalised encoder inputs, and what is to be reconstructed.

    length: what errors are multiplied by to be in the model's units, of each token, for token_norm; else None.
    """

    inputs: Float[Tensor, "n d"]
    target: Float[Tensor, "n d_out"]
    length: Float[Tensor, "n 1"] | None


def alone(values: Tensor) -> Tensor:
    """What one process gathers of itself."""
    return values


class Objective(nn.Module):
    """An autoencoder in training. silent: rows since each feature was last active, [m]; variance: of the rows that
    training began with, summed over channels; batches: how many there were, for batch_topk's threshold.

    gather: values of this process to those of all processes, along the first axis.
    """

    silent: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, sae: SparseAutoencoder, gather: Callable[[Tensor], Tensor] = alone) -> None:
        super().__init__()
        self.sae, self.gather = sae, gather
        self.register_buffer("silent", torch.zeros(sae.config.n_features, dtype=torch.int64))
        self.register_buffer("variance", torch.ones((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def start(self, rows: Float[Tensor, "n d"], output: Float[Tensor, "n d_out"] | None = None) -> None:
        """Fit the autoencoder to rows (`SparseAutoencoder.start`), and find their variance."""
        self.sae.start(rows, output)
        target = self.sae.output_normalisation.normalise((rows if output is None else output).float()).double()
        self.variance.copy_((target - target.mean(0)).square().sum(1).mean())

    def forward(
        self, rows: Float[Tensor, "n d"], number: int, output: Float[Tensor, "n d_out"] | None = None,
        previous: Float[Tensor, "n d"] | None = None,
    ) -> Terms:  # fmt: skip
        """One batch. number: of the step, counted from 0; output: a transcoder's other site; previous: temporal's
        tokens one step before."""
        config, n = self.sae.config, len(rows)
        if previous is not None:
            rows = torch.cat([rows, previous])
        batch = self._batch(rows.to(self.sae.w_enc.dtype), output)
        y, extra, code = self._found(batch, number)
        error = self._error(y, batch)
        loss = self._scaled(error) + extra
        if config.prefixes is not None:
            assert isinstance(code, Code)
            loss = self._nested(code, error, batch)
        if previous is not None and config.schedule.contrast:
            assert isinstance(code, Code)
            loss = loss + config.schedule.contrast * contrast(code, n, config.n_features, config.schedule.temperature)
        fired, l0 = self._fired(code)
        aux = self._aux(batch, y)
        fvu = error.detach() / self.variance.to(error.dtype)
        return Terms(loss + config.schedule.aux_weight * aux, fvu, l0, aux.detach(), fired)

    @torch.no_grad()
    def missed(
        self, rows: Float[Tensor, "n d"], output: Float[Tensor, "n d_out"] | None = None
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d_out"]]:
        """(encoder inputs, what the autoencoder misses of its target), normalised; no term of training changes."""
        batch, sae = self._batch(rows.to(self.sae.w_enc.dtype), output), self.sae
        base = torch.zeros_like(sae.b_dec) if batch.length is not None else sae.b_dec
        return batch.inputs, batch.target - (sae.encode(rows) @ sae.w_dec + base)

    def _batch(self, rows: Tensor, output: Tensor | None) -> Batch:
        sae = self.sae
        if sae.config.normalisation == "token_norm":
            centred = rows - sae.b_dec
            mean, length = of_token(centred)
            return Batch((centred - mean) / length, (centred - mean) / length, length)
        y = sae.normalisation.normalise(rows)
        target = y if output is None else sae.output_normalisation.normalise(output.to(y.dtype))
        return Batch((y - sae.b_dec).detach() if sae.config.subtract_decoder_bias else y, target, None)

    def _error(self, y: Tensor, batch: Batch) -> Tensor:
        """Mean squared length of what is missed."""
        missed = y - batch.target
        return (missed if batch.length is None else missed * batch.length).square().sum(1).mean()

    def _scaled(self, error: Tensor) -> Tensor:
        """A mean squared length as the loss has it."""
        kind = self.sae.config.schedule.loss
        if kind == "sum":
            return error
        return error / (self.sae.config.d_decoded if kind == "mse" else self.variance.to(error.dtype))

    @property
    def _base(self) -> Tensor:
        """What the decoder adds; with token_norm nothing, since errors are told before that is undone."""
        return torch.zeros_like(self.sae.b_dec) if self.sae.config.normalisation == "token_norm" else self.sae.b_dec

    def _found(self, batch: Batch, number: int) -> tuple[Tensor, Tensor, Code | Tensor]:
        """(what is decoded, sparsity term, code) by architecture."""
        sae, training = self.sae, self.sae.config.schedule
        if sae.config.k is not None:
            return self._sparse(batch)
        z, bias = functional.linear(batch.inputs, sae.w_enc), self._encoder_bias()
        weight = training.penalty_at(number)
        if sae.config.architecture == "gated":
            return self._gated(batch, z, bias, weight)
        z = (z + bias).relu()
        if sae.config.architecture == "jumprelu":
            threshold = sae.threshold
            f = jump_relu(z, threshold, training.bandwidth)
            extra = weight * step(z, threshold, training.bandwidth).sum(1).mean()
        else:
            f = z
            extra = weight * (f @ sae.w_dec.norm(dim=1)).mean()
        return f @ sae.w_dec + self._base, extra, f

    def _encoder_bias(self) -> Tensor:
        """b_enc; the decoder's bias, which was taken off the inputs, has its gradient by way of what is 0 here."""
        sae = self.sae
        if not sae.config.subtract_decoder_bias:
            return sae.b_enc
        return sae.b_enc + sae.w_enc.detach() @ (sae.b_dec.detach() - sae.b_dec)

    def _gated(self, batch: Batch, z: Tensor, bias: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gate has gradients by the penalty and by reconstructing alone, with the decoder held (arXiv 2404.16014,
        eq. 8)."""
        sae = self.sae
        gate = (z + bias).relu()
        magnitude = (z + (bias - sae.b_enc)) * sae.magnitude_scale.exp() + sae.magnitude_bias
        f = torch.where(gate > 0, magnitude.relu(), 0)
        by_gate = self._error(gate @ sae.w_dec.detach() + self._base.detach(), batch)
        extra = weight * (gate @ sae.w_dec.norm(dim=1)).mean() + self._scaled(by_gate)
        return f @ sae.w_dec + self._base, extra, f

    def _sparse(self, batch: Batch) -> tuple[Tensor, Tensor, Code]:
        """Architectures with k, through the sparse kernels."""
        sae, config = self.sae, self.sae.config
        assert config.k is not None
        x, relu = batch.inputs.contiguous(), config.relu
        if sae.by_k:
            code = choose(x.detach(), sae.w_enc, sae.b_enc, config.k, relu)
        else:
            code, least = choose_in_batch(x.detach(), sae.w_enc, sae.b_enc, config.k, self.gather)
            self._remember(least)
        offset = sae.b_dec if config.subtract_decoder_bias and batch.length is None else None
        code = Code(chosen_values(x, offset, sae.w_enc, sae.b_enc, code, relu), code.indices)
        return decoded(code, sae.w_dec, self._base), x.new_zeros(()), code

    def _nested(self, code: Code, error: Tensor, batch: Batch) -> Tensor:
        """Matryoshka: the mean over prefixes of the features of what each alone leaves over."""
        sae = self.sae
        assert sae.config.prefixes is not None
        errors = [error]
        for size in sae.config.prefixes[:-1]:
            kept = Code(torch.where(code.indices < size, code.values, 0), code.indices)
            errors.append(self._error(decoded(kept, sae.w_dec, self._base), batch))
        return self._scaled(torch.stack(errors).mean())

    @torch.no_grad()
    def _remember(self, least: Tensor) -> None:
        """Move batch_topk's threshold towards the least active value of a batch."""
        threshold = self.sae.get_buffer("batch_threshold")
        self.batches += 1
        last = max(1.0, REMEMBERED * self.sae.config.schedule.steps)
        share = torch.clamp(1 / self.batches.to(threshold.dtype), min=1 / last)
        threshold.copy_(torch.where(least.isfinite(), threshold + share * (least - threshold), threshold))

    @torch.no_grad()
    def _fired(self, code: Code | Tensor) -> tuple[Tensor, Tensor]:
        """(which features were active, how many of them a token had)."""
        if isinstance(code, Tensor):
            active = code != 0
            return active.any(0), active.sum(1, dtype=torch.float32).mean()
        active = code.values != 0
        fired = torch.zeros(self.sae.config.n_features, dtype=torch.bool, device=active.device)
        # those that are not active go to feature m, which is none
        where = torch.where(active, code.indices, self.sae.config.n_features).flatten().long()
        fired = functional.pad(fired, (0, 1)).index_fill_(0, where, True)[:-1]
        return fired, active.sum(1, dtype=torch.float32).mean()

    def _aux(self, batch: Batch, y: Tensor) -> Tensor:
        """AuxK (arXiv 2406.04093, A.2): the share of what y misses that dead features miss in turn."""
        sae, training = self.sae, self.sae.config.schedule
        nothing = batch.inputs.new_zeros(())
        if not training.aux_k:
            return nothing
        dead = (self.silent >= training.dead_after).nonzero()[:, 0]
        if not len(dead):
            return nothing
        missed = (batch.target - y).detach()
        total = self.gather(missed.square().sum(1).mean()[None]).mean().clamp_min(1e-30)
        z = functional.linear(batch.inputs.detach(), sae.w_enc[dead], sae.b_enc[dead])
        values, indices = z.topk(min(training.aux_k, len(dead)), dim=1)
        # below zero too, or what is far from being active has no gradient; so many of so few are faster as dense ones
        f = torch.zeros_like(z).scatter(1, indices, values)
        return (f @ sae.w_dec[dead] - missed).square().sum(1).mean() / total


def contrast(code: Code, n: int, m: int, temperature: float) -> Tensor:
    """InfoNCE, both ways, between the codes of n tokens and those of the same tokens one step before (the second n):
    cosine similarities over the temperature, the other tokens of the batch being the wrong answers (arXiv 2511.05541).
    """
    lengths = code.values.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = code.values / lengths
    now, before = Code(unit[:n], code.indices[:n]), Code(unit[n:], code.indices[n:])
    # rows of a dictionary of n columns: the code of `before`, turned round
    columns = spread(before, m).T.contiguous()
    logits = decoded(now, columns, columns.new_zeros(n)) / temperature
    right = torch.arange(n, device=logits.device)
    return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2
