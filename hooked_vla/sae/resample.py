"""Dead features start anew on tokens that are reconstructed badly (transformer-circuits.pub/2023/monosemantic-features,
appendix "Neuron resampling")."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from hooked_vla.sae.losses import Objective

# a revived encoder row's length, as a share of the mean of the living ones
ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(
    objective: Objective, state: Mapping[Tensor, dict[str, Any]], number: int, rows: Float[Tensor, "n d"],
    output: Float[Tensor, "n d_out"] | None = None,
) -> int:  # fmt: skip
    """Give every dead feature a token's direction, drawn by the square of its loss; how many there were.

    state: the optimiser's, by parameter: its memory of revived rows is wiped. number: of the step, which with the seed
    decides what is drawn.
    """
    sae, schedule = objective.sae, objective.sae.config.schedule
    dead = (objective.silent >= schedule.dead_after).nonzero()[:, 0]
    if not len(dead):
        return 0
    inputs, missed = objective.missed(rows, output)
    loss = missed.square().sum(1).double()
    if not float(loss.sum()) > 0:
        return 0
    generator = torch.Generator().manual_seed((schedule.seed << 32) + number)
    chosen = (loss.square() / loss.square().max()).cpu().multinomial(len(dead), True, generator=generator)
    chosen = chosen.to(rows.device)
    alive = torch.ones_like(objective.silent, dtype=torch.bool).index_fill_(0, dead, False)
    encoder, decoder = (
        float(each[alive].norm(dim=1).mean()) if bool(alive.any()) else 1.0 for each in (sae.w_enc, sae.w_dec)
    )
    towards = functional.normalize(inputs[chosen], dim=1)
    sae.w_enc[dead] = towards * (ENCODER_SHARE * encoder)
    back = towards if output is None else functional.normalize(missed[chosen], dim=1)
    sae.w_dec[dead] = back * (1.0 if sae.config.unit_decoder else decoder)
    sae.b_enc[dead] = 0
    if sae.config.architecture == "gated":
        sae.magnitude_scale[dead] = 0
        sae.magnitude_bias[dead] = 0
    if sae.config.architecture == "jumprelu":
        sae.log_threshold[dead] = torch.tensor(schedule.threshold, dtype=torch.float64).log().to(dead.device)
    for parameter in sae.parameters():
        if len(parameter) == sae.config.n_features:
            _forget(state.get(parameter, {}), dead)
    objective.silent[dead] = 0
    return len(dead)


def _forget(memory: dict[str, Any], dead: Int64[Tensor, " dead"]) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        if name in memory:
            memory[name][dead] = 0
