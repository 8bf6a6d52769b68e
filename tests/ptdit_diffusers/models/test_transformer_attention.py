"""The transformer's attention under diffusers' handles: processors, backends, LoRA scale."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from ptdit_diffusers.models.attention_ptdit import PTDiTAttention, PTDiTAttnProcessor
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny


class Watching(PTDiTAttnProcessor):
    """A user's own processor."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return super().__call__(*arguments, **options)


@torch.no_grad()
def test_every_attention_has_a_processor_of_its_own_that_can_be_replaced():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    layers = [layer for layer in transformer.modules() if isinstance(layer, PTDiTAttention)]
    assert len(layers) == len(set(map(id, transformer.attn_processors.values()))) == 10
    assert {layer.is_cross_attention for layer in layers} == {True, False}

    transformer.set_attn_processor({name: Watching() for name in transformer.attn_processors})
    assert torch.equal(transformer(**arguments()).sample, plain)
    assert [processor.calls for processor in transformer.attn_processors.values()] == [1] * 10

    shared = Watching()
    transformer.set_attn_processor(shared)
    transformer(**arguments())
    assert shared.calls == 10
    with pytest.raises(ValueError, match="number of processors"):
        transformer.set_attn_processor({})


@pytest.mark.usefixtures("native_again")
@pytest.mark.parametrize("backend", ["_native_math", "flex"])
@torch.no_grad()
def test_every_backend_that_runs_here_gives_the_same_numbers(backend):
    transformer = tiny()
    inputs = arguments() | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    plain = transformer(**inputs).sample
    transformer.set_attention_backend(backend)
    chosen = transformer(**inputs).sample
    transformer.reset_attention_backend()
    with attention_backend(backend):
        around = transformer(**inputs).sample
    assert torch.allclose(chosen, plain, atol=1e-5) and torch.equal(around, chosen)


@torch.no_grad()
def test_attention_kwargs_scale_a_lora_for_one_call():
    from peft import LoraConfig

    transformer = tiny()
    plain = transformer(**arguments()).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    full = transformer(**arguments()).sample
    half, none = (transformer(**arguments(), attention_kwargs={"scale": scale}).sample for scale in (0.5, 0.0))
    assert torch.allclose(none, plain, atol=1e-5)
    assert 0 < (half - plain).norm() < (full - plain).norm()
    assert torch.equal(transformer(**arguments()).sample, full)
