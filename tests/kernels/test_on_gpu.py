"""Every op on a GPU, on its Triton kernels: against float64, bit for bit where promised, in CUDA graphs, compiled.

Inputs, calls and what they are compared with come from the benchmark, which times nothing that fails here.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounds import same_bits
from torch import Tensor
from unchecked import unchecked_shapes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_ops
from op_cases import CASES, PER_TOKEN, Case, Inputs, Shape, first_tokens

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EACH_OP = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
# n, d, m, k, S: sizes of a model, and odd ones
SIZES = [(50, 1024, 8192, 64, 16), (3, 721, 1600, 37, 5), (130, 96, 777, 16, 1)]
# a token's result is that token's alone
BY_TOKEN = ("delta_splice", "sae_splice", "lowrank_edit", "sae_encode_topk", "sparse_decode", "rank_count")


def make(case: Case, size: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Shape, Inputs]:
    shape = Shape(*size, dtype, DEVICE)
    return shape, case.make(shape, torch.Generator(DEVICE).manual_seed(seed))


def results(call: Callable[[Inputs], Tensor | tuple[Tensor | None, ...]], inputs: Inputs) -> list[Tensor]:
    made = call(inputs)
    return [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]


@EACH_OP
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_float64_and_itself(case: Case, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError beyond the bound of the dtype, and where two runs differ."""
    shape, inputs = make(case, size, dtype)
    bench_ops.check(case, shape, inputs)


@EACH_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_the_others(case: Case, dtype: torch.dtype) -> None:
    if case.op not in BY_TOKEN:
        assert case.op in ("segment_mean_delta", "sparse_backward")
        return
    _, inputs = make(case, SIZES[0], dtype)
    together = results(case.ours, inputs)
    for n in (1, 7, 33):
        for few, all_of_them in zip(results(case.ours, first_tokens(inputs, n)), together, strict=True):
            assert same_bits(few, all_of_them[:n])


@EACH_OP
def test_a_captured_graph_sees_new_contents(case: Case) -> None:
    """Tokens and edits change in place between replays; nothing waits for the host."""
    _, inputs = make(case, SIZES[0], torch.bfloat16)
    _, others = make(case, SIZES[0], torch.bfloat16, seed=1)
    expected = results(case.ours, others)
    results(case.ours, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case.ours, inputs)
    for name, value in others.items():
        if isinstance(value, Tensor):
            inputs[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(mine, right) for mine, right in zip(captured, expected, strict=True))


@EACH_OP
@unchecked_shapes()
def test_compiles_as_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    _, inputs = make(case, SIZES[1], torch.bfloat16)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for mine, right in zip(results(compiled, inputs), results(case.ours, inputs), strict=True):
        assert same_bits(mine, right)


def test_every_input_of_a_token_is_named() -> None:
    """first_tokens() cuts exactly the inputs that have a row for each token."""
    for case in CASES:
        shape, inputs = make(case, SIZES[2], torch.float32)
        rows = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[0] == shape.n}
        assert rows == set(PER_TOKEN) & set(inputs), case.op
