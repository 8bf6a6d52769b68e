"""What devices can do, with answers that other machines would give."""

import pytest
import torch

from ptdit_diffusers.core.devices import check_compiler, check_operations, computes_bf16


@pytest.mark.parametrize("real", [True, False])
def test_a_gpu_that_only_emulates_bf16_does_not_count(monkeypatch, real):
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: real or including_emulation, raising=True
    )
    assert computes_bf16("cuda") == computes_bf16(torch.device("cuda:1")) == real


def test_a_cpu_is_asked_for_its_instructions_where_torch_tells_them(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able}, raising=False)
        assert computes_bf16("cpu") == able
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # of torch 2.6
        monkeypatch.setattr(torch._C._cpu, name, lambda: False, raising=False)
    assert not computes_bf16("cpu")
    monkeypatch.setattr(torch._C._cpu, "_is_amx_tile_supported", lambda: True)
    assert computes_bf16("cpu")


def test_apples_gpus_compute_in_bf16_since_macos_14(monkeypatch):
    for version in (13, 14):
        monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda major, _, v=version: v >= major)
        assert computes_bf16("mps") == (version == 14)


@pytest.mark.parametrize("problem", ["is missing", "gives wrong numbers"])
def test_an_operation_that_a_device_lacks_or_computes_wrongly_is_named_before_it_is_used(monkeypatch, problem):
    check_operations.cache_clear()
    check_operations("cpu")
    calls = []

    def broken(numbers, *arguments, **options):
        calls.append(numbers)
        if len(calls) == 1 and problem == "is missing":
            raise NotImplementedError
        return torch.zeros(1) if len(calls) == 1 else right(numbers, *arguments, **options)

    right = torch.nn.functional.interpolate
    monkeypatch.setattr("torch.nn.functional.interpolate", broken)
    check_operations.cache_clear()
    with pytest.raises(RuntimeError, match=f"trilinear resizing {problem} on this cpu device.*; use the CPU"):
        check_operations("cpu")


def test_a_machine_without_a_compiler_is_refused_in_words(monkeypatch):
    def fail(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setattr("torch.compile", fail)
    with pytest.raises(ValueError, match="needs a C.. compiler.*: InvalidCxxCompiler: No.*found; leave compile out"):
        check_compiler("cpu")
    with pytest.raises(ValueError, match="needs triton"):
        check_compiler("cuda")
