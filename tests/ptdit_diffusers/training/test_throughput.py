"""The peaks of devices, and counting the operations of a step."""

import pytest
import torch

from ptdit_diffusers.training.throughput import peak_flops, step_flops


@pytest.mark.parametrize(
    "name, bf16, tf32",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA L4", 121e12, 60.5e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.5e12),
        ("Tesla T4", None, None),
    ],
)
def test_the_peak_of_a_known_gpu_is_found_by_its_name(monkeypatch, name, bf16, tf32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert (peak_flops(device, True), peak_flops(device, False)) == (bf16, tf32)
    assert peak_flops(device, True, given=5) == 5e12


def test_the_peak_of_a_cpu_is_unknown_unless_it_is_given():
    assert peak_flops(torch.device("cpu"), True) is None
    assert peak_flops(torch.device("cpu"), False, given=0.5) == 5e11


def test_operations_of_forward_and_backward_are_counted_without_values():
    with torch.device("meta"):
        layer, points = torch.nn.Linear(4, 8), torch.zeros(3, 4)
    assert step_flops(lambda: layer(points).sum()) == 2 * (2 * 3 * 4 * 8)  # the input needs no gradient
