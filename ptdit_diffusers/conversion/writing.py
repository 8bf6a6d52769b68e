"""Write weights as safetensors, tensor by tensor, sharded as diffusers and transformers expect it.

safetensors' own writer takes all tensors of a file at once, so a whole model must be in memory. The format is simple:
8 bytes with the length of the header, the header as JSON (name -> dtype, shape, place), then the numbers.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from ptdit_diffusers.core.checkpoint_names import ConversionError

from .containers import FLOATS, FP8, Facts, Weights

SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def plan_dtypes(weights: Weights, asked: torch.dtype | None) -> dict[str, Facts]:
    """Return shape and number format of each weight as it will be written.

    Args:
        asked: Format of all weights; None keeps what the file has, but fp8 becomes bf16 and float64 float32.

    Raises:
        ConversionError: Weights are integers, so they are quantized.
    """
    planned = {}
    for name, (shape, dtype) in weights.facts.items():
        if dtype not in FLOATS + FP8:
            raise ConversionError(
                f"{weights.path}: {name} holds {str(dtype).removeprefix('torch.')} numbers, so the file is quantized; "
                "convert the original file (fp32, bf16, fp16 or plain fp8)"
            )
        kept = {torch.float64: torch.float32}.get(dtype, torch.bfloat16 if dtype in FP8 else dtype)
        planned[name] = Facts(shape, asked or kept)
    return planned


def bytes_of(facts: Facts) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(facts.shape) * facts.dtype.itemsize


def write_weights(folder: Path, stem: str, weights: Weights, planned: dict[str, Facts]) -> None:
    """Write all planned weights to `stem`.safetensors, or to numbered shards and their index.

    Raises:
        ConversionError: A weight is NaN or infinite, or becomes so in the new number format.
        OSError: The disk is full, for example.
    """
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name in sorted(planned, key=lambda name: (-planned[name].dtype.itemsize, name)):  # keeps tensors aligned
        if shards[-1] and bytes_of(planned[name]) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= bytes_of(planned[name])
    index = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_file(folder / f"{stem}{part}.safetensors", names, weights, planned)
        index |= dict.fromkeys(names, f"{stem}{part}.safetensors")
    if len(shards) > 1:
        total = sum(bytes_of(facts) for facts in planned.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_file(path: Path, names: list[str], weights: Weights, planned: dict[str, Facts]) -> None:
    """Write one safetensors file; one tensor is in memory at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in names:
        shape, dtype = planned[name]
        end = place + bytes_of(planned[name])
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in weights.stream(names):
            file.write(numbers(weights.path, name, tensor, planned[name].dtype))
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only now


def numbers(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Return the bytes of a tensor in a number format.

    Raises:
        ConversionError: A number is NaN or infinite, or becomes so.
    """
    converted = tensor.to(dtype).contiguous().reshape(-1)
    if not torch.isfinite(converted if dtype.itemsize > 1 else converted.float()).all():
        if torch.isfinite(tensor.float()).all():
            short = {torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}.get(dtype, dtype)
            raise ConversionError(f"{path}: {name} is too large for {short}; take --dtype bf16 or fp32")
        raise ConversionError(f"{path}: {name} holds NaN or infinite numbers, so the file is damaged; fetch it again")
    return memoryview(converted.view(torch.uint8).numpy())
