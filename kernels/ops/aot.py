"""Compiles Triton kernels ahead of time, for GPUs that are not there, and reports what came out of it.

    python -m hooked_vla.kernels.aot [--ops delta_splice ...] [--targets sm_80 sm_90 gfx942]

prints a JSON list, one entry a configuration and target: registers, spills, shared memory, instructions found. Each
op's fused.py lists in CONFIGS what its table of shapes can choose. A process of its own: Triton must not have been
imported with TRITON_INTERPRET=1, and a compiler that crashes takes nothing else with it.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# architecture and lanes of a warp for Triton's GPUTarget; bytes of shared memory that one block may have: CUDA C++
# programming guide, table of technical specifications (163 KB for 8.0, 227 KB for 9.0); CDNA3 ISA guide (64 KB)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}

# what Config.expects may be: matrix products on tensor cores, loads of 16 bytes
TENSOR_CORES = {"sm_80": ("mma.sync",), "sm_90": ("wgmma",), "gfx942": ("v_mfma",)}
WIDE_LOADS = {"sm_80": ("ld.global.v4",), "sm_90": ("ld.global.v4",), "gfx942": ("global_load_dwordx4",)}


@dataclass(frozen=True)
class Config:
    """One way that an op launches a kernel.

    kernel: the @triton.jit function. signature: argument -> Triton's type ("*bf16", "i32"), for those that are not
    constexprs. divisible: arguments whose value (of a pointer: address) is a multiple of 16. expects: target ->
    instructions, of which each must occur in the machine code's text (PTX or AMDGCN). options: others of Triton's.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: Sequence[str]
    num_warps: int
    num_stages: int
    name: str
    expects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError unless every argument of the kernel is in exactly one of signature and constexprs."""
        arguments, given = set(self.kernel.arg_names), {*self.signature, *self.constexprs}
        if arguments != given or set(self.signature) & set(self.constexprs):
            raise ValueError(
                f"{self.name}: signature and constexprs must name each argument of the kernel once; "
                f"missing {sorted(arguments - given)}, unknown {sorted(given - arguments)}, "
                f"twice {sorted(set(self.signature) & set(self.constexprs))}"
            )
        if unknown := sorted(set(self.divisible) - set(self.signature)):
            raise ValueError(f"{self.name}: divisible names {unknown}, which the signature has not")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one configuration. registers: of one thread; spills, shared: bytes.

    missing: expected instructions that do not occur.
    """

    op: str
    name: str
    target: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    missing: tuple[str, ...]


def ops_with_kernels() -> list[str]:
    """Every op that has a fused.py."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/fused.py"))


def configurations(op: str) -> Sequence[Config]:
    """CONFIGS of an op's fused.py. Raises ValueError for an op without one."""
    if op not in ops_with_kernels():
        raise ValueError(f"op must be one of {ops_with_kernels()}, got {op!r}")
    return importlib.import_module(f"hooked_vla.kernels.{op}.fused").CONFIGS


def _nvidia_resources(cubin: bytes, ptx: str) -> tuple[int, int]:
    """(registers, bytes of stack for registers that spill) of the one function in a cubin.

    The PTX may ask for some stack itself, before registers are given out; that is no spill.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in cuobjdump's output: {text!r}")
    asked = sum(int(size) for size in re.findall(r"__local_depot\d+\[(\d+)\]", ptx))
    # stacks are made of 8 bytes each
    return int(found[1]), max(0, int(found[2]) - -(-asked // 8) * 8)


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled vector and scalar registers)."""
    values = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s*(\d+)", assembly)}
    return values["vgpr_count"], values["vgpr_spill_count"] + values["sgpr_spill_count"]


def compile_config(op: str, config: Config, target: str) -> Compiled:
    """Raises ValueError for an unknown target or an ill-formed configuration; Triton's own errors pass through."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"target must be one of {sorted(TARGETS)}, got {target!r}")
    if knobs.runtime.interpret:
        raise ValueError("kernels cannot be compiled where TRITON_INTERPRET is set")
    config.check()
    names = config.kernel.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=config.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in config.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in config.divisible},
    )
    backend, arch, lanes, limit = TARGETS[target]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.options}
    made = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=options)
    if backend == "cuda":
        text, (registers, spills) = made.asm["ptx"], _nvidia_resources(made.asm["cubin"], made.asm["ptx"])
    else:
        text = made.asm["amdgcn"]
        registers, spills = _amd_resources(text)
    missing = tuple(each for each in config.expects.get(target, ()) if each not in text)
    return Compiled(op, config.name, target, registers, spills, made.metadata.shared, limit, missing)


def compile_all(ops: Sequence[str], targets: Sequence[str]) -> Iterator[Compiled]:
    for op in ops:
        for config in configurations(op):
            for target in targets:
                try:
                    yield compile_config(op, config, target)
                except Exception as error:
                    error.add_note(f"while compiling {config.name} of {op} for {target}")
                    raise


def compile_in_subprocess(ops: Sequence[str], targets: Sequence[str] = tuple(TARGETS)) -> list[Compiled]:
    """What `compile_all` finds, from a fresh process. Raises RuntimeError with its output when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hooked_vla.kernels.aot", "--ops", *ops, "--targets", *targets]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"compiling {list(ops)} for {list(targets)} failed:\n{done.stderr}{done.stdout}")
    return [Compiled(**{**entry, "missing": tuple(entry["missing"])}) for entry in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hooked_vla.kernels.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", default=ops_with_kernels(), choices=ops_with_kernels())
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    given = parser.parse_args()
    print(json.dumps([asdict(each) for each in compile_all(given.ops, given.targets)], indent=1))


if __name__ == "__main__":
    main()
