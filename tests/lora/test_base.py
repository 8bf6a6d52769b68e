"""What a device must be able to do, with answers that other machines would give."""

import pytest
import torch

from lora.config import LoRASettings
from lora.requirements import check_device
from ptdit_diffusers.training.base_model import choose_dtype


@pytest.mark.parametrize("real", [True, False])
def test_bf16_is_chosen_only_on_a_gpu_that_does_not_emulate_it(monkeypatch, caplog, real):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: real or including_emulation)
    gpu = torch.device("cuda")
    assert choose_dtype("auto", gpu) == (torch.bfloat16 if real else torch.float32)
    assert choose_dtype("auto", torch.device("cpu")) == choose_dtype("auto", torch.device("mps")) == torch.float32
    assert choose_dtype("bf16", gpu) == torch.bfloat16
    assert ("only emulates bf16" in caplog.text) == (not real)


def test_what_a_device_cannot_do_is_refused_before_anything_is_loaded(monkeypatch):
    settings = LoRASettings(base_weights="fp8", compile=True)
    with pytest.raises(ValueError, match="base_weights='fp8': mps has no float8; nearest: 'none'"):
        check_device(settings, torch.device("mps"))
    monkeypatch.setattr("torch.compile", lambda function: 1 / 0)
    with pytest.raises(ValueError, match="torch.compile does not work here"):
        check_device(settings, torch.device("cpu"))
    check_device(LoRASettings(base_weights="fp8"), torch.device("cpu"))
