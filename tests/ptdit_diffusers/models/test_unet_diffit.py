"""DiffiT's image-space network as a model of diffusers: saving, LoRA, backends, memory, compilation, bad input."""

import pytest
import torch
from torch import nn

from ptdit_diffusers import DiffiTUNet2DModel
from tests.ptdit_diffusers.core.backbones.test_diffit_unet import TINY
from tests.ptdit_diffusers.offloading import GROUPS, check_offloading


def tiny(**options) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    unet = DiffiTUNet2DModel(**{**TINY, "num_classes": 3, **options}).eval()
    for parameter in unet.parameters():  # also those that begin at zero
        nn.init.normal_(parameter, std=0.2)
    return unet


def arguments() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([0.9, -0.4]),
        "class_labels": torch.tensor([2, 3]),
    }


@torch.no_grad()
def relative_error(unet: nn.Module, reference: torch.Tensor) -> float:
    return float((unet(**arguments()).sample - reference).norm() / reference.norm())


@torch.no_grad()
def test_saving_and_loading_keeps_numbers_and_configuration(tmp_path):
    unet = tiny()
    unet.save_pretrained(tmp_path)
    again = DiffiTUNet2DModel.from_pretrained(tmp_path)
    assert again.config.layers_per_block == [1, 2] or again.config.layers_per_block == (1, 2)
    assert relative_error(again, unet(**arguments()).sample) == 0
    half = DiffiTUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sample = half(**arguments() | {"sample": arguments()["sample"].bfloat16()}).sample
    assert sample.dtype == torch.bfloat16
    assert (sample - unet(**arguments()).sample).norm() < 0.05 * sample.norm()


def test_presets_are_models():
    with torch.device("meta"):
        unet = DiffiTUNet2DModel.from_preset("cifar10", num_classes=10)
    assert unet.config.window_size == 4 and unet.y_embedder.embedding_table.weight.shape == (11, 512)


def test_gradient_checkpointing_gives_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny(dropout=0.2).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(3)  # of dropout, and of the dropped labels
        unet(**arguments()).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    assert all(torch.allclose(*pair, atol=1e-5, rtol=1e-4) for pair in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_lora_of_peft_attaches_and_loads(tmp_path):
    from peft import LoraConfig

    unet = tiny()
    plain = unet(**arguments()).sample
    unet.add_adapter(LoraConfig(r=2, target_modules=["qkv", "qkv_temb", "proj"], init_lora_weights=False))
    full = unet(**arguments()).sample
    assert (full - plain).norm() > 0
    unet.save_lora_adapter(tmp_path)
    again = tiny()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(again(**arguments()).sample, full, atol=1e-5)


@pytest.mark.usefixtures("native_again")
@torch.no_grad()
def test_attention_goes_through_the_dispatcher_of_diffusers():
    unet = tiny()
    plain = unet(**arguments()).sample
    unet.set_attention_backend("_native_math")
    assert torch.allclose(unet(**arguments()).sample, plain, atol=1e-4)
    assert len(unet.attn_processors) == 4


@torch.no_grad()
def test_fp8_storage_works():
    plain = tiny()(**arguments()).sample
    unet = tiny()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < relative_error(unet, plain) < 0.2


@GROUPS
@torch.no_grad()
def test_group_offloading_changes_nothing(groups, tmp_path):
    unet = tiny()
    check_offloading(unet, lambda: unet(**arguments()).sample, tmp_path, groups)


@torch.no_grad()
def test_noise_levels_and_classes_share_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    unet = tiny()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    for label in range(2):
        inputs = arguments() | {"timestep": torch.tensor([label * 0.3]), "class_labels": torch.tensor([label, 3])}
        assert torch.allclose(compiled(**inputs).sample, unet(**inputs).sample, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_no_label_is_the_null_class():
    unet, inputs = tiny(), arguments()
    null = unet(**inputs | {"class_labels": torch.tensor(3)}).sample
    assert torch.equal(unet(inputs["sample"], inputs["timestep"], return_dict=False)[0], null)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sample": torch.zeros(2, 3, 8)}, r"shape \(2, 3, 8\); it must be \(batch, channels, height, width"),
        ({"sample": torch.zeros(2, 3, 8, 10)}, "width=10 gives 5 cells per side at stage 2, .*; nearest: 8 or 12"),
        ({"class_labels": torch.tensor([0, 4])}, "class label 4 must be 0 to 3; nearest: 3"),
        ({"class_labels": torch.tensor([0, 1, 2])}, "class_labels has 3 members for a batch of 2; pass 2 or one"),
        ({"timestep": torch.tensor([0.0, 1, 2])}, "timestep has 3 members for a batch of 2; pass 2 or one"),
    ],
)
def test_illegal_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments() | inputs)


def test_classes_and_models_must_fit():
    with pytest.raises(ValueError, match="this model is unconditional .num_classes=0.; leave class_labels out"):
        tiny(num_classes=0)(**arguments())
    with pytest.raises(ValueError, match="trained without a null class, so it needs class_labels"):
        tiny(class_dropout_prob=0.0)(**arguments() | {"class_labels": None})
