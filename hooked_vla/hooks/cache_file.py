"""Activation caches on disk: safetensors, written tensor by tensor so that a large cache is never held twice."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.hooks.cache import ActivationCache, Entry
from hooked_vla.hooks.point import SegmentTable
from hooked_vla.inputs import Segments

FORMAT = "hooked_vla.activation_cache.1"
_SEGMENTS = "segments/"
# names that the safetensors format gives to dtypes
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]],
    metadata: dict[str, str],
) -> None:
    """Write (name, dtype, shape, make) in order, making one tensor at a time; atomic by renaming."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape, _ in tensors:
        size = torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, _, _, make in tensors:
                raw = make().detach().cpu().contiguous()
                file.write(raw.reshape(-1).view(torch.uint8).numpy().data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_cache(cache: ActivationCache, path: Path) -> None:
    """See ActivationCache.save."""
    streams = sorted({stream for entry in cache.entries.values() for stream in entry.streams.values()})
    segments = {stream: cache.segments[stream] for stream in streams}
    described = {
        "batch_size": cache.batch_size,
        "order": cache.order,
        "aliases": cache.aliases,
        "entries": {
            name: {
                "axes": entry.axes,
                "streams": dict(entry.streams),
                "steps": entry.steps,
                "shared": len(cache.parts[name]) == 1,
            }
            for name, entry in cache.entries.items()
        },
        "segments": {stream: {"names": each.names, "row_axis": each.row_axis} for stream, each in segments.items()},
    }
    tensors = []
    for name, parts in cache.parts.items():
        part = parts[0]
        if len(parts) == 1:
            tensors.append((name, part.dtype, tuple(part.shape), lambda part=part: part))
        else:
            shape = (len(parts), *part.shape)
            tensors.append((name, part.dtype, shape, lambda parts=parts: torch.stack(list(parts))))
    for stream, each in segments.items():
        tensors.append((_SEGMENTS + stream, each.labels.dtype, tuple(each.labels.shape), lambda e=each: e.labels))
    write_safetensors(path, tensors, {"format": FORMAT, "cache": json.dumps(described)})


def load_cache(path: Path, device: str | torch.device) -> ActivationCache:
    """See ActivationCache.load."""
    torch.empty(0, device=device)
    try:
        file = safe_open(path, framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    with file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not an activation cache: format {metadata.get('format')!r}, not {FORMAT!r}")
        described = json.loads(metadata["cache"])
        parts, entries = {}, {}
        for name, each in described["entries"].items():
            steps = None if each["steps"] is None else tuple(each["steps"])
            entries[name] = Entry(tuple(each["axes"]), each["streams"], steps)
            tensor = file.get_tensor(name)
            parts[name] = [tensor] if each["shared"] else list(tensor.unbind(0))
        segments = {
            stream: Segments(tuple(each["names"]), file.get_tensor(_SEGMENTS + stream), each["row_axis"])
            for stream, each in described["segments"].items()
        }
    return ActivationCache(
        parts, entries, described["aliases"], described["batch_size"], SegmentTable(lambda: segments).settle(),
        tuple(described["order"]),
    )  # fmt: skip
