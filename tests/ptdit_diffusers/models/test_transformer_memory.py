"""diffusers' ways to save memory work on the transformer: fp8 storage, offloading, shards, quantization."""

import json

import pytest
import torch
from torch import Tensor, nn

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny
from tests.ptdit_diffusers.offloading import GROUPS, check_offloading


@torch.no_grad()
def relative_error(transformer: nn.Module, reference: Tensor) -> float:
    return float((transformer(**arguments()).sample - reference).norm() / reference.norm())


@torch.no_grad()
def test_fp8_storage_keeps_large_layers_small_and_small_ones_exact():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: value.dtype for name, value in transformer.state_dict().items()}
    small = ("pos_embed", "adaln_single", "scale_shift_table", "proj_out")
    assert all((dtype == torch.float32) == any(word in name for word in small) for name, dtype in stored.items())
    assert 0 < relative_error(transformer, plain) < 0.1
    assert transformer.dtype == torch.float32


@GROUPS
@torch.no_grad()
def test_group_offloading_changes_nothing(groups, tmp_path):
    transformer = tiny()
    check_offloading(transformer, lambda: transformer(**arguments()).sample, tmp_path, groups)


@torch.no_grad()
def test_cpu_offload_fetches_every_tensor_that_a_forward_needs():
    from accelerate import cpu_offload

    transformer = tiny()
    plain = transformer(**arguments()).sample
    cpu_offload(transformer, torch.device("cpu"))
    assert all(value.is_meta for value in transformer.parameters())
    assert torch.equal(transformer(**arguments()).sample, plain)


@torch.no_grad()
def test_a_device_map_splits_between_blocks_never_inside_one(tmp_path):
    transformer = tiny(num_layers=3)
    plain = transformer(**arguments()).sample
    transformer.save_pretrained(tmp_path / "model")
    block = sum(value.numel() * 4 for value in transformer.transformer_blocks[0].parameters())
    whole = sum(value.numel() * 4 for value in transformer.parameters())
    split = PTDiTTransformer3DModel.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": whole - block // 2},
        offload_folder=tmp_path / "disk",
    )
    places = {name: str(place) for name, place in split.hf_device_map.items()}
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(name.startswith("transformer_blocks.") and name.count(".") > 1 for name in places)
    assert torch.equal(split(**arguments()).sample, plain)


@torch.no_grad()
def test_a_block_on_another_device_gets_all_its_inputs_there():
    """The meta device stands for a second accelerator."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    transformer = tiny(proxy_mode="first")
    block = transformer.transformer_blocks[1].to("meta")
    add_hook_to_module(block, AlignDevicesHook(execution_device="meta"))
    seen = []

    def look(layer, inputs, named):
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        if "windows" in named:
            tensors += [named["windows"].order, named["windows"].inverse]
        seen.extend(tensor.is_meta for tensor in tensors)

    for layer in (block.proxy_attn1, block.attn1, block.attn3, block.attn2):
        layer.register_forward_pre_hook(look, with_kwargs=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    block.register_forward_hook(lambda _, inputs, output: inputs[0])  # back to where the rest of the model is
    transformer(**arguments(), encoder_attention_mask=mask)
    assert len(seen) == 10 and all(seen)


@torch.no_grad()
def test_shards_and_variants_load_again(tmp_path):
    transformer = tiny()
    transformer.save_pretrained(tmp_path, max_shard_size="100KB", variant="ema")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.ema.json").read_text(encoding="utf-8"))
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((tmp_path / name).suffix == ".safetensors" and ".ema" in name for name in files)
    again = PTDiTTransformer3DModel.from_pretrained(tmp_path, variant="ema")
    assert relative_error(again, transformer(**arguments()).sample) == 0
    with pytest.raises(OSError):
        PTDiTTransformer3DModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_bf16_loading_keeps_the_modulation_tables_in_fp32(tmp_path):
    transformer = tiny()
    transformer.save_pretrained(tmp_path)
    half = PTDiTTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    kept = {name for name, value in half.named_parameters() if value.dtype == torch.float32}
    assert kept == {name for name, _ in half.named_parameters() if name.endswith("scale_shift_table")}
    inputs = {name: value.bfloat16() if value.ndim > 1 else value for name, value in arguments().items()}
    sample = half(**inputs).sample
    assert sample.dtype == torch.bfloat16
    reference = transformer(**arguments()).sample
    assert (sample - reference).norm() / reference.norm() < 0.05


class Int8Linear(nn.Module):
    """A layer as quantization libraries put in Linear's place: no floating weight, another dtype than the input's."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale.to(inputs.dtype), self.bias)


@torch.no_grad()
def test_every_linear_layer_can_be_replaced_by_a_quantized_one():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    linear = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in linear:
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, Int8Linear(layer))
    left = [name for name, value in transformer.named_parameters() if value.is_floating_point() and value.ndim > 1]
    assert all(name.endswith("scale_shift_table") or name == "pos_embed.proj.weight" for name in left)
    assert 0 < relative_error(transformer, plain) < 0.05


@torch.no_grad()
def test_torchao_stores_int8_and_computes_nearly_the_same(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    transformer = tiny()
    transformer.save_pretrained(tmp_path)
    quantized = PTDiTTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    assert "Int8Tensor" in type(quantized.transformer_blocks[1].attn3.to_q.weight).__name__
    assert 0 < relative_error(quantized, transformer(**arguments()).sample) < 0.05


@torch.no_grad()
def test_a_gguf_file_loads_by_from_single_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig

    transformer = tiny()
    transformer.save_config(tmp_path)
    eight_bit = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="ptdit")
    for name, value in transformer.state_dict().items():
        array = value.numpy()
        if name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, eight_bit), raw_dtype=eight_bit)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = PTDiTTransformer3DModel.from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert again.transformer_blocks[0].attn1.to_q.weight.dtype == torch.uint8
    assert 0 < relative_error(again, transformer(**arguments()).sample) < 0.05


@pytest.mark.parametrize("as_built", [True, False])
def test_a_lora_on_int8_weights_gets_the_gradients_that_it_gets_on_plain_ones(as_built, tmp_path):
    """As built, two output layers of each block are zero: in the first step nothing before them gets a gradient."""
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig
    from peft import LoraConfig

    plain = tiny()
    if as_built:
        plain.initialize_weights()
    plain.save_pretrained(tmp_path)
    int8 = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = PTDiTTransformer3DModel.from_pretrained(tmp_path, quantization_config=int8, torch_dtype=torch.float32)
    without = {}
    for name, transformer in (("plain", plain), ("int8", quantized)):
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"]))
        transformer(**arguments()).sample.square().mean().backward()
        matrices = [(key, weight) for key, weight in transformer.named_parameters() if "lora_B" in key]
        assert len(matrices) == 22 and all(weight.grad is not None for _, weight in matrices)
        without[name] = {key.split(".")[2] for key, weight in matrices if not weight.grad.any()}
    assert without["int8"] == without["plain"] == ({"proxy_attn1", "pvisual_attn2", "attn3"} if as_built else set())
