"""Every kernel configuration compiles for GPUs that are not here, without spills, within their shared memory."""

import sys

import pytest
from unchecked import unchecked_shapes

from hooked_vla.kernels import dispatch
from hooked_vla.kernels.aot import TARGETS, Config, compile_in_subprocess, configurations, ops_with_kernels

NEEDS_TRITON = pytest.mark.skipif(
    not dispatch.has_triton() and sys.platform != "linux", reason="Triton cannot be installed here: it is not Linux"
)


# the one whose kernels take as long as all others, in a process of its own
SLOWEST = "sae_encode_topk"


@NEEDS_TRITON
@pytest.mark.parametrize(
    "ops", [[SLOWEST], [op for op in ops_with_kernels() if op != SLOWEST]], ids=["slowest", "rest"]
)
def test_kernels_fit_the_gpus(ops: list[str]) -> None:
    made = compile_in_subprocess(ops)
    assert {(each.op, each.target) for each in made} == {(op, target) for op in ops for target in TARGETS}
    for each in made:
        assert each.spills == 0, f"registers spill: {each}"
        assert each.shared <= each.shared_limit, f"too much shared memory: {each}"
        assert not each.missing, f"instructions missing: {each}"


class Kernel:
    arg_names = ("x_ptr", "n", "BLOCK")


@unchecked_shapes()
@pytest.mark.parametrize(
    ("signature", "constexprs", "divisible", "message"),
    [
        ({"x_ptr": "*fp32"}, {"BLOCK": 16}, (), r"missing \['n'\]"),
        ({"x_ptr": "*fp32", "n": "i32", "d": "i32"}, {"BLOCK": 16}, (), r"unknown \['d'\]"),
        ({"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 16, "n": 4}, (), r"twice \['n'\]"),
        ({"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 16}, ("y_ptr",), r"divisible names \['y_ptr'\]"),
    ],
)
def test_configurations_name_every_argument_once(signature, constexprs, divisible, message) -> None:
    config = Config(Kernel, signature, constexprs, divisible, 4, 2, "toy")
    with pytest.raises(ValueError, match="toy: .*" + message):
        config.check()


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*'delta_splice'.*, got 'softmax'"):
        configurations("softmax")


@NEEDS_TRITON
def test_a_failure_shows_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"invalid choice: 'sm_1'"):
        compile_in_subprocess(["delta_splice"], ["sm_1"])
