"""How much of a device a training uses: floating-point operations of a step, against the device's peak (MFU)."""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Part of the name of a GPU -> dense bf16 operations per second, in 10^12, from the vendors' data sheets. With
# float32 weights matrices are multiplied as TF32, at half of that on all of these.
PEAKS = {
    r"\bB200\b": 2250,
    r"\bH200\b": 989,
    r"\bH100 PCIe\b": 756,
    r"\bH100 NVL\b": 835,
    r"\bH100\b": 989,
    r"\bA100\b": 312,
    r"\bL40S\b": 362,
    r"\bL4\b": 121,
    r"\bA10\b": 125,
    r"\bRTX A6000\b": 155,
    r"\bRTX 5090\b": 209,
    r"\bRTX 4090\b": 165,
    r"\bRTX 3090\b": 71,
}


def peak_flops(device: torch.device, bf16: bool, given: float = 0.0) -> float | None:
    """Return the floating-point operations per second that a device can do at most; None = unknown.

    Args:
        device: Of the training.
        bf16: Whether matrices are multiplied in bf16; else in TF32.
        given: The value in 10^12, where it is not to be looked up by the device's name; 0 = look it up.
    """
    if given:
        return given * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = next((peak for part, peak in PEAKS.items() if re.search(part, name)), None)
    return found and found * 1e12 / (1 if bf16 else 2)


def step_flops(loss: Callable[[], Tensor]) -> int:
    """Return the floating-point operations of a forward and backward; on the device "meta" nothing is computed."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    return counter.get_total_flops()
