"""What a device really can: number formats that some only emulate, and operations that some compute wrongly."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ERROR = 1e-3  # of an operation in float32 on numbers near 1; rounding stays below 1e-5


def computes_bf16(device: torch.device | str) -> bool:
    """Return whether a device has instructions for bfloat16 products; others emulate them, which is slow.

    GPUs of Nvidia have them since Ampere (not: T4, V100, GTX 16, RTX 20), all GPUs that ROCm supports have them, and
    those of Apple since macOS 14.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return kind == "cpu" and _cpu_computes_bf16()


def _cpu_computes_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    checks = (getattr(torch._C._cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check)  # of older torch, which says nothing about ARM


def has_float8(device: torch.device | str) -> bool:
    """Return whether tensors of a device can be stored in float8, which GPUs of Apple cannot."""
    return torch.device(device).type != "mps"


def check_compiler(device: torch.device | str) -> None:
    """Compile an addition for a device.

    Raises:
        ValueError: torch.compile does not work here, mostly because there is no compiler.
    """
    try:
        torch.compile(lambda numbers: numbers + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds: no compiler, no triton, a Python that torch cannot compile yet
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        needed = "triton" if torch.device(device).type == "cuda" else "a C++ compiler (on Windows Visual Studio's)"
        raise ValueError(
            f"torch.compile does not work here, it needs {needed}: {reason}; leave compile out."
        ) from error


@lru_cache
def check_operations(device: str) -> None:
    """Compare the operations of a VAE with the CPU, once per process; for GPUs of Apple.

    Some releases of macOS and torch lack them there, or compute them wrongly without an error.

    Args:
        device: For example "mps".

    Raises:
        RuntimeError: One is missing or wrong; names it and what to do.
    """
    generator = torch.Generator().manual_seed(0)
    video = torch.randn((1, 8, 4, 12, 12), generator=generator)  # (B, C, T, H, W)
    weight = torch.randn((8, 8, 3, 3, 3), generator=generator) / 8
    operations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "a 3D convolution": lambda x, w: F.conv3d(x, w, padding=1),
        "trilinear resizing": lambda x, w: F.interpolate(x, scale_factor=(2, 2, 2), mode="trilinear"),
        "bilinear resizing": lambda x, w: F.interpolate(x[:, :, 0], scale_factor=(2, 2), mode="bilinear"),
    }
    for name, operation in operations.items():
        try:
            found = operation(video.to(device), weight.to(device)).to("cpu")
        except NotImplementedError:
            found = None
        if found is None or not torch.allclose(found, operation(video, weight), rtol=0, atol=LARGEST_ERROR):
            problem = "is missing" if found is None else "gives wrong numbers"
            raise RuntimeError(
                f"{name} {problem} on this {device} device with torch {torch.__version__}, and the VAE needs it; use "
                "the CPU (device cpu), or newer releases of torch and the system."
            )
