"""DiffiT as a model of diffusers: saving, LoRA, backends, memory, compilation, bad input."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import save_file
from torch import nn

from ptdit_diffusers import DiffiT2DModel, DiT2DModel
from ptdit_diffusers.core.checkpoint_names import ConversionError
from tests.ptdit_diffusers import diffit_goldens
from tests.ptdit_diffusers.models.test_transformer_dit import arguments, relative_error, sizes
from tests.ptdit_diffusers.models.test_transformer_memory import Int8Linear
from tests.ptdit_diffusers.offloading import GROUPS, check_offloading

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 3}
WINDOWS = {"window_size": 2, "shift_window": True}
LINEAR = ["qkv", "qkv_temb", "proj", "fc1", "fc2"]
CASE = "diffit_p2"
GOLDEN = diffit_goldens.load(CASE)
BOTH = pytest.mark.parametrize("options", [{}, WINDOWS], ids=["global", "windows"])


def tiny(**options) -> DiffiT2DModel:
    torch.manual_seed(0)
    transformer = DiffiT2DModel(**{**TINY, **options}).eval()
    for parameter in transformer.parameters():  # also those that begin at zero
        nn.init.normal_(parameter, std=0.2)
    return transformer


def error_of(transformer: DiffiT2DModel) -> float:
    with torch.no_grad():
        return (transformer(GOLDEN["in.x"], GOLDEN["in.t"], GOLDEN["in.y"]).sample - GOLDEN["out"]).abs().max().item()


# --- loading and saving ----------------------------------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_saving_and_loading_keeps_numbers_and_configuration(tmp_path, options):
    transformer = tiny(**options)
    transformer.save_pretrained(tmp_path)
    again = DiffiT2DModel.from_pretrained(tmp_path)
    assert sizes(again) == sizes(transformer)
    assert relative_error(again, transformer(**arguments()).sample) == 0
    half = DiffiT2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.pos_embed.dtype == torch.float32
    inputs = arguments() | {"hidden_states": arguments()["hidden_states"].bfloat16()}
    sample = half(**inputs).sample
    assert sample.dtype == torch.bfloat16
    assert (sample - transformer(**arguments()).sample).norm() < 0.05 * sample.norm()


@torch.no_grad()
def test_autocast_keeps_the_numbers_nearly():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < relative_error(transformer, plain) < 0.05


def test_a_folder_with_official_index_buffers_loads_and_is_checked(tmp_path):
    transformer = diffit_goldens.model(CASE)
    transformer.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(diffit_goldens.weights(CASE), path)
    assert error_of(DiffiT2DModel.from_pretrained(tmp_path)) < diffit_goldens.LIMIT
    name = "blocks.0.attn.relative_position_index"
    save_file(diffit_goldens.weights(CASE) | {name: torch.zeros(64, 64, dtype=torch.long)}, path)
    with pytest.raises(ValueError, match=f"{name} is not the index of a window of 8 x 8 tokens"):
        DiffiT2DModel.from_pretrained(tmp_path)


def test_folders_of_dit_and_diffit_are_not_mixed_up(tmp_path):
    tiny().save_pretrained(tmp_path / "diffit")
    DiT2DModel(**TINY).save_pretrained(tmp_path / "dit")
    with pytest.raises(ConversionError, match="diffit holds a DiffiT2DModel, not a DiT"):
        DiT2DModel.from_pretrained(tmp_path / "diffit")
    with pytest.raises(ConversionError, match="dit holds a DiT2DModel, not a DiffiT"):
        DiffiT2DModel.from_pretrained(tmp_path / "dit")


def test_presets_are_models():
    with torch.device("meta"):
        transformer = DiffiT2DModel.from_preset("DiffiT-512", num_layers=1)
    assert transformer.blocks[0].attn.relative_position_bias_table.shape == (3969, 16)


# --- features of diffusers -------------------------------------------------------------------------------------------


@BOTH
def test_gradient_checkpointing_gives_equal_gradients(options):
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny(class_dropout_prob=0.5, **options).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        torch.manual_seed(3)  # of the dropped labels
        transformer(**arguments()).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in transformer.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))
    table = transformer.blocks[0].attn.relative_position_bias_table
    assert table.grad.abs().max() > 0


@torch.no_grad()
def test_a_lora_of_peft_attaches_scales_saves_and_loads(tmp_path):
    from peft import LoraConfig

    transformer = tiny()
    plain = transformer(**arguments()).sample
    transformer.add_adapter(LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False))
    full = transformer(**arguments()).sample
    half, none = (transformer(**arguments(), attention_kwargs={"scale": scale}).sample for scale in (0.5, 0.0))
    assert torch.allclose(none, plain, atol=1e-5)
    assert 0 < (half - plain).norm() < (full - plain).norm()
    transformer.save_lora_adapter(tmp_path)
    again = tiny()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(again(**arguments()).sample, full, atol=1e-6)
    again.set_adapters("default_0", 0.5)
    assert torch.allclose(again(**arguments()).sample, half, atol=1e-6)


@pytest.mark.usefixtures("native_again")
@torch.no_grad()
def test_every_attention_goes_through_the_dispatcher_of_diffusers():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    assert len(transformer.attn_processors) == 2
    transformer.set_attention_backend("_native_math")
    chosen = transformer(**arguments()).sample
    transformer.reset_attention_backend()
    with attention_backend("_native_math"):
        assert torch.equal(transformer(**arguments()).sample, chosen)
    assert torch.allclose(chosen, plain, atol=1e-5)
    with attention_backend("_native_flash"):  # which takes no bias
        assert torch.equal(transformer(**arguments()).sample, plain)


@torch.no_grad()
def test_fp8_storage_keeps_large_layers_small_and_tables_exact():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    large = {name for name, value in transformer.state_dict().items() if value.dtype == torch.float8_e4m3fn}
    assert {name.split(".", 2)[2] for name in large} == {
        f"{layer}.{kind}" for layer in ("attn.qkv", "attn.qkv_temb", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }  # fmt: skip
    assert 0 < relative_error(transformer, plain) < 0.15


@BOTH
@GROUPS
@torch.no_grad()
def test_group_offloading_changes_nothing(options, groups, tmp_path):
    transformer = tiny(**options)
    check_offloading(transformer, lambda: transformer(**arguments()).sample, tmp_path, groups)


@torch.no_grad()
def test_offloading_by_accelerate_fetches_every_tensor():
    from accelerate import cpu_offload

    transformer = tiny(**WINDOWS)
    plain = transformer(**arguments()).sample
    cpu_offload(transformer, torch.device("cpu"))
    assert torch.equal(transformer(**arguments()).sample, plain)


@torch.no_grad()
def test_every_linear_layer_can_be_replaced_by_a_quantized_one():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    for name, layer in [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]:
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, Int8Linear(layer))
    assert 0 < relative_error(transformer, plain) < 0.05


@torch.no_grad()
def test_torchao_stores_int8_and_computes_nearly_the_same(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    transformer = tiny()
    transformer.save_pretrained(tmp_path)
    quantized = DiffiT2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert "Int8Tensor" in type(quantized.blocks[1].attn.qkv_temb.weight).__name__
    assert 0 < relative_error(quantized, transformer(**arguments()).sample) < 0.05


@BOTH
@torch.no_grad()
def test_steps_and_classes_share_one_graph(options):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    transformer = tiny(**options)
    compiled = torch.compile(transformer, fullgraph=True, backend=backend)
    for label in range(3):
        inputs = arguments() | {"timestep": torch.tensor([label * 300]), "class_labels": torch.tensor([label, 3])}
        assert torch.allclose(compiled(**inputs).sample, transformer(**inputs).sample, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_blocks_share_a_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    transformer = tiny(num_layers=3)
    plain = transformer(**arguments()).sample
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert torch.allclose(transformer(**arguments()).sample, plain, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 16, 16)}, "latents of 16 x 16 must be 8 x 8: .*; nearest: 8 x 8"),
        ({"hidden_states": torch.zeros(2, 4, 8, 7)}, "latent width=7 is not a multiple of the patch size 2"),
        ({"class_labels": torch.tensor([0, 4])}, "class label 4 must be 0 to 3, 3 being the null class; nearest: 3"),
        ({"timestep": torch.tensor([0, 1, 2])}, "timestep has 3 members for a batch of 2; pass 2 or one"),
    ],
)
def test_illegal_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments() | inputs)
