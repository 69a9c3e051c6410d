"""How much memory training takes: a formula, and what stands in it."""

from collections.abc import Sequence

from hooked_vla.kernels.sae_encode_topk.cpu import Z_BLOCK
from hooked_vla.sae.activations import FIRST_LOOK
from hooked_vla.sae.config import SAEConfig


def training_bytes(configs: Sequence[SAEConfig]) -> int:
    """Bytes that training holds at once on one process, at most, beside the source and the model.

        22·P                     P parameters, m·(d + d_out) and biases; their gradients, Adam's two moments, and
                                 what a step makes of them in passing
        + 4·n·6·(d + d_out)      n rows of a batch, normalised, reconstructed, missed, and their gradients
        + 4·n·16·k               a code of k features (batch_topk, matryoshka: 3·k), by token and by feature
        + 4·2·min(n·m, 2²⁴)      pre-activations, a block of tokens at a time
        or + 4·n·8·m             for architectures without k, whose codes are dense
        + 4·n·4·m                with AuxK, if all features were dead

    The parts of several autoencoders add up, but for the blocks, of which one is there at a time.
    """
    total = block = 0
    for config in configs:
        n, m, widths = config.schedule.batch_size, config.n_features, config.d_model + config.d_decoded
        total += 22 * (m * widths + 3 * m + config.d_decoded) + 4 * n * 6 * widths
        if config.k is None:
            total += 4 * n * 8 * m
        else:
            wide = FIRST_LOOK if config.architecture in ("batch_topk", "matryoshka") else 1
            total += 4 * n * 16 * config.k * wide
            block = max(block, min(n * m, Z_BLOCK))
        if config.schedule.aux_k:
            total += 4 * n * 4 * m
    return total + 4 * 2 * block
