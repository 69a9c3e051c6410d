"""Autoencoders on disk: FOLDER/sae.safetensors holds weights and config, FOLDER/config.json the config for readers.

A file appears under its name when complete, and the weights' own copy of the config is the one that counts, so that a
folder is never half of one autoencoder and half of another without being noticed.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.folders import write_file
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.sae.config import SAEConfig

FORMAT = "hooked-vla sae 1"
WEIGHTS, CONFIG = "sae.safetensors", "config.json"
# the trained autoencoders that come with the package: <model>/<site>
SHIPPED = Path(__file__).parent.parent / "zoo" / "saes"


def shipped_saes() -> list[str]:
    """Names of the autoencoders that come with the package, `<model>/<site>`."""
    return sorted(path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob(f"*/*/{WEIGHTS}"))


def save(sae: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write an autoencoder into a folder, which is made if need be; what was there is replaced.

    dtype: of the weights in the file; float16 halves it and costs 3 digits. Raises ValueError for weights that are
    not finite, or would not be in that dtype.
    """
    entries = []
    for name, tensor in sae.state_dict().items():
        # thresholds and what normalises are few numbers that everything is compared with
        kept = tensor.detach() if tensor.ndim < 2 else tensor.detach().to(dtype)
        if not bool(kept.isfinite().all()):
            raise ValueError(f"{sae.config.label}: {name} is not finite in {kept.dtype}; it was not saved")
        entries.append((name, kept.dtype, tuple(kept.shape), lambda kept=kept: kept))
    folder.mkdir(parents=True, exist_ok=True)
    text = sae.config.to_json()
    write_safetensors(folder / WEIGHTS, entries, {"format": FORMAT, "config": text})
    write_file(folder / CONFIG, text.encode())


def load(kind: Any, folder_or_name: str | Path, device: str | torch.device) -> Any:
    """Read an autoencoder of class `kind` from a folder, or from the package by its name, in float32.

    Raises FileNotFoundError, with the names that there are; ValueError for files that are truncated, damaged, of
    another format, or do not belong together.
    """
    folder = _find(folder_or_name)
    config, tensors = _read(folder / WEIGHTS)
    readable = folder / CONFIG
    if readable.is_file() and SAEConfig.from_json(readable.read_bytes()) != config:
        raise ValueError(
            f"{readable} is not the config of {WEIGHTS} beside it; remove it (the weights hold their own), or save the "
            "autoencoder again"
        )
    sae = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differ = sorted(set(expected.items()) ^ set(found.items()))
        raise ValueError(f"{folder / WEIGHTS}: tensors do not fit its config: {[f'{n} {list(s)}' for n, s in differ]}")
    sae.load_state_dict(tensors)
    return sae.to(device).eval()


def _find(folder_or_name: str | Path) -> Path:
    folder = Path(folder_or_name)
    if (folder / WEIGHTS).is_file():
        return folder
    if str(folder_or_name) in (names := shipped_saes()):
        return SHIPPED / str(folder_or_name)
    raise FileNotFoundError(
        f"{folder_or_name} is no folder with {WEIGHTS}, nor an autoencoder that comes with the package: {names}"
    )


def _read(path: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        config = SAEConfig.from_json(metadata.get("config", ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{path} holds NaN or infinity in {bad}")
    return config, tensors
