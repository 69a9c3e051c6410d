"""How Inductor is asked to compile; above all, without last bits of its own.

By default Inductor fuses whatever it can, and two things then change bits (measured on a CPU in float32): sums, in
norms, softmax and means, are made in another order; and exp, sin, tanh, gelu and even sqrt are other approximations,
for eager takes them from a library of vector maths. Neither can be asked for as eager has it. With `exact_options` only
those operations are compiled and fused to which IEEE 754 leaves one result: copies, choices, comparisons and + - × ÷,
each rounded to its own dtype, never contracted to a multiply-add.
"""

from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten

# by the packet that all of an operation's overloads belong to
_EXACT = frozenset({
    _aten.add, _aten.sub, _aten.mul, _aten.div, _aten.neg, _aten.abs, _aten.relu, _aten.eq, _aten.ne, _aten.lt,
    _aten.le, _aten.gt, _aten.ge, _aten.logical_and, _aten.logical_or, _aten.logical_not, _aten.bitwise_and,
    _aten.bitwise_or, _aten.bitwise_not, _aten.where, _aten.masked_fill, _aten.clone, _aten._to_copy, _aten.cat,
    _aten.view, _aten._unsafe_view, _aten.expand, _aten.permute, _aten.transpose, _aten.unsqueeze, _aten.squeeze,
    _aten.slice, _aten.select, _aten.split, _aten.split_with_sizes, _aten.unbind, _aten.alias,
})  # fmt: skip


def _is_exact(node: Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "overloadpacket", None) not in _EXACT:
        return False
    # eager multiplies by alpha and adds in one rounding; division may round to whole numbers
    alpha, rounding = node.kwargs.get("alpha", 1), node.kwargs.get("rounding_mode")
    return isinstance(alpha, int | float) and alpha == 1 and rounding is None


@cache
def exact_options() -> dict[str, Any]:
    """Options of `torch.compile` under which compiled results are eager's, bit for bit, on a CPU.

    Raises RuntimeError on a PyTorch whose Inductor cannot leave operations to eager.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.lowering import lowerings

    class CompileExactOperations(CustomGraphPass):
        """Marks what Inductor may compile; all else falls back."""

        def __call__(self, graph: Graph) -> None:
            for node in graph.nodes:
                # the others would have to be decomposed first
                if _is_exact(node) and node.target in lowerings:
                    node.meta["custom"] = {**node.meta.get("custom", {}), "compile_with_inductor": {}}

        def uuid(self) -> str:
            return "hooked_vla exact operations 1"

    options = {
        "fallback_by_default": True,
        "selective_decompose": True,
        # rewriting passes look for patterns, not for bits
        "use_pre_grad_passes": False,
        "use_joint_graph_passes": False,
        "pattern_matcher": False,
        "post_grad_custom_pre_pass": CompileExactOperations(),
        # fused operations round to their dtype in between, as separate ones do
        "emulate_precision_casts": True,
        "fallback_random": True,
    }
    if missing := [name for name in options if not hasattr(config, name)]:
        raise RuntimeError(f"PyTorch {torch.__version__} cannot compile exactly: its Inductor has no {missing}")
    return options


def unfused_options() -> dict[str, Any]:
    """Options under which Inductor calls eager's kernels one by one, and compiles nothing itself.

    Raises RuntimeError on a PyTorch whose Inductor has no such mode.
    """
    from torch import _inductor

    return _inductor.list_mode_options("lite") | {"fallback_random": True}


def fused_options() -> dict[str, Any]:
    """Options for Inductor's own choice of what to fuse; random numbers are still eager's."""
    return {"fallback_random": True}
