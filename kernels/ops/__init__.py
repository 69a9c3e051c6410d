"""Fused operations for interventions, one folder an op; kernels/README.md says how they are laid out.

Plain PyTorch where there is no GPU; Triton is imported when an op first runs on one.
"""

from hooked_vla.kernels.delta_splice import delta_splice, delta_splice_features, fold_bias
from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.lowrank_edit import lowrank_edit
from hooked_vla.kernels.rank_count import rank_count
from hooked_vla.kernels.sae_encode_topk import encode_gmax, sae_encode_topk, select_topk
from hooked_vla.kernels.sae_splice import sae_splice
from hooked_vla.kernels.segment_mean_delta import segment_add, segment_mean, segment_mean_delta
from hooked_vla.kernels.sparse_backward import sparse_backward
from hooked_vla.kernels.sparse_decode import sparse_decode

__all__ = [
    "delta_splice",
    "delta_splice_features",
    "encode_gmax",
    "fold_bias",
    "lowrank_edit",
    "rank_count",
    "sae_encode_topk",
    "sae_splice",
    "segment_add",
    "segment_mean",
    "segment_mean_delta",
    "select_topk",
    "sparse_backward",
    "sparse_decode",
    "use",
]  # fmt: skip
