"""Which path of an op runs, what overrides it, and what is said about it."""

import logging
import subprocess
import sys

import pytest
import torch
from unchecked import unchecked_shapes

from hooked_vla import kernels
from hooked_vla.kernels import dispatch
from hooked_vla.kernels.dispatch import implementation, use

PATHS = {name: lambda name=name: lambda: name for name in ("reference", "fused", "cpu")}
CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_override", None)
    monkeypatch.setattr(dispatch, "_logged", set())


class OnGpu:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype


def chosen(x: object, paths: dict = PATHS) -> str:
    with unchecked_shapes():
        return implementation("op", paths, x)()


def test_a_cpu_takes_its_own_path_if_there_is_one() -> None:
    assert chosen(CPU) == "cpu"
    assert chosen(CPU, {name: PATHS[name] for name in ("reference", "fused")}) == "reference"


@pytest.mark.parametrize(
    ("dtype", "triton", "old", "path"),
    [
        (torch.bfloat16, True, False, "fused"),
        (torch.float64, True, False, "reference"),
        (torch.bfloat16, False, False, "reference"),
        (torch.bfloat16, True, True, "reference"),
    ],
)
def test_a_gpu_takes_triton_where_it_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, triton: bool, old: bool, path: str
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    monkeypatch.setattr(dispatch, "_old_cuda", lambda index: old)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert chosen(OnGpu(dtype)) == path


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *error: object) -> None:
            entered.append("left")

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_old_cuda", lambda index: False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert chosen(OnGpu()) == "fused" and entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert chosen(OnGpu()) == "fused" and entered == [OnGpu.device, "left"]


def test_other_devices_take_the_reference() -> None:
    assert chosen(torch.zeros(1, device="meta")) == "reference"


def test_use_holds_until_the_next_or_the_end_of_its_block() -> None:
    use("reference")
    assert chosen(CPU) == "reference"
    with use("cpu"):
        assert chosen(CPU) == "cpu"
        with use(None):
            assert chosen(CPU) == "cpu"
            use("reference")
        assert chosen(CPU) == "cpu"
    assert chosen(CPU) == "reference"
    with pytest.raises(RuntimeError, match="stop"), use("cpu"):
        raise RuntimeError("stop")
    assert chosen(CPU) == "reference"
    use(None)
    assert chosen(CPU) == "cpu"


def test_one_use_in_several_blocks() -> None:
    reference = use("reference")
    for _ in range(2):
        with reference:
            assert chosen(CPU) == "reference"
            with use("cpu"), reference:
                assert chosen(CPU) == "reference"
            assert chosen(CPU) == "reference"
        assert chosen(CPU) == "cpu"
    # what is in force between making it and entering it changes nothing
    later = use("reference")
    use("cpu")
    with later:
        assert chosen(CPU) == "reference"
    assert chosen(CPU) == "cpu"


def test_errors_name_the_op_and_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"path must be one of 'reference', 'fused', 'cpu' or None, got 'cuda'"):
        use("cuda")
    with use("cpu"), pytest.raises(ValueError, match=r"op: no 'cpu' path; it has 'reference'"):
        chosen(CPU, {"reference": PATHS["reference"]})
    with use("cpu"), pytest.raises(ValueError, match=r"op: the 'cpu' path takes CPU tensors, got x on cuda:0"):
        chosen(OnGpu())
    with use("fused"), pytest.raises(ValueError, match=r"op: the 'fused' path takes .* got x of torch.float64"):
        chosen(CPU.double())
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with use("fused"), pytest.raises(ValueError, match=r"op: the 'fused' path needs Triton"):
        chosen(CPU)


def test_fused_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    with use("fused"), pytest.raises(ValueError, match=r"op: .* cpu tensors only in Triton's interpreter"):
        chosen(CPU)
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)
    with use("fused"):
        assert chosen(CPU) == "fused"


def test_says_once_which_path_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for _ in range(3):
            chosen(CPU)
    assert caplog.messages == ["op on cpu: cpu path, because it is the fast path on a CPU"]
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name), use("reference"):
        chosen(CPU)
    assert caplog.messages[1:] == ['op on cpu: reference path, because use("reference")']


def test_the_door_needs_neither_a_gpu_nor_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hooked_vla.kernels as k\n"
        "x = torch.randn(3, 4)\n"
        "y = k.segment_add(x, torch.ones(1, 4), torch.tensor([0, -1, 0], dtype=torch.int32))\n"
        "assert torch.equal(y[1], x[1]) and torch.equal(y[0], x[0] + 1)\n"
        "print('ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_the_door_names_what_it_has() -> None:
    assert list(kernels.__all__) == sorted(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
