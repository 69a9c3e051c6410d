"""Full-size models in bfloat16 with random weights: what a chunk takes, and that loading holds one copy.

Each model runs in a process of its own, so that the peak is its own: it is built and saved in the public layout by
one process, then loaded and run by another. Times on a CPU only say what to expect on such a machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, commit, machine, write_json
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hooked_vla import HookedVLA, Observation, get_spec, registry

FITS = ("smolvla", "xvla", "pi05", "groot_n15", "groot_n17")


def build(name: str, folder: str) -> dict[str, Any]:
    """Save the model at its published size with random weights in bfloat16."""
    spec = get_spec(name)
    # bytes as tokens: the public tokenizer is not needed to know what a prompt costs
    spec = replace(spec, features=replace(spec.features, tokenizer="bytes"))
    torch.set_default_dtype(torch.bfloat16)
    model = HookedVLA.from_network(spec, registry.build_network(spec))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return {}


def run(name: str, folder: str) -> dict[str, Any]:
    """Load it, run one chunk from a raw observation, and one more that caches every residual."""
    before = peak_bytes()
    start = time.perf_counter()
    model = HookedVLA.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    loading = time.perf_counter() - start
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.net.state_dict().values())
    loaded = peak_bytes() - before
    features = model.spec.features
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    # a spec that leaves the cameras to the robot gets one
    images = dict.fromkeys(features.cameras or ("front",), image)
    obs = Observation(images, np.zeros(features.d_state, np.float32), "pick up the block")
    inputs = model.prepare(obs)
    start = time.perf_counter()
    model.sample_actions(inputs)
    chunk = time.perf_counter() - start
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.net.parameters()),
        "cameras": len(images),
        "denoise_steps": model.n_denoise_steps,
        "weights_gb": round(held / 1e9, 2),
        "loading_peak_over_weights": round(loaded / held, 2),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "loading_s": round(loading, 1),
        "chunk_s": round(chunk, 1),
        "residuals_gb": round(model.cache_size(inputs, "*.hook_resid_*") / 1e9, 2),
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far; file pages that loading maps count while they are in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(step: str, name: str, folder: str, threads: int) -> dict[str, Any]:
    """One step of one model, its result read from the last line that it prints."""
    command = [
        sys.executable,
        __file__,
        "--step",
        step,
        "--models",
        name,
        "--folder",
        folder,
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{step} of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FITS), help="names of models")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_models_cpu.json", help="where the result goes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--step", choices=("build", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step is not None:
        step = build if options.step == "build" else run
        print(json.dumps(step(options.models[0], options.folder)))
        return
    rows = []
    about = {"machine": machine(options.threads), "torch": torch.__version__, "commit": commit(), "dtype": "bfloat16"}
    for name in tqdm(options.models, unit="model"):
        with tempfile.TemporaryDirectory() as folder:
            in_own_process("build", name, folder, options.threads)
            rows.append(in_own_process("run", name, folder, options.threads))
        # after every model: the next one may not fit
        write_json(options.json, about | {"rows": rows})
    table = Table("model", "weights GB", "loading ÷ weights", "peak GB", "loading s", "chunk s", "all residuals GB")
    columns = ("model", "weights_gb", "loading_peak_over_weights", "peak_gb", "loading_s", "chunk_s", "residuals_gb")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
