"""Quantized copies of a model: each loads by the ordinary loaders, is smaller, and computes nearly the same."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GGUFQuantizationConfig
from safetensors.torch import load_file

from ptdit_diffusers import (
    AutoencoderKLOpenSoraPlan,
    ClassToImagePipeline,
    DiT2DModel,
    PTDiTPipeline,
    PTDiTTransformer3DModel,
    official_scheduler,
)
from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion import quantize as module
from ptdit_diffusers.conversion.q4_k import quantize_q4_k
from ptdit_diffusers.conversion.quantize import load_in_fp8, quantize, store_in_fp8
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG, ConversionError
from ptdit_diffusers.core.configuration import folder_config, loaded_transformer_config, pack_config
from ptdit_diffusers.core.embedded import embedded_model_path
from tests.conftest import word_tokenizer
from tests.ptdit_diffusers.class_models import tiny_vae

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
WIDTH = 64


def t5():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", is_encoder_decoder=False)  # fmt: skip
    return T5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A bf16 pipeline whose widths are multiples of 32, as those of the official model are."""
    torch.manual_seed(0)
    transformer = PTDiTTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, num_layers=2, sample_size=8, caption_channels=WIDTH,
        window_size=(1, 2, 2), proxy_ratio=(1, 2, 2), num_windows=4,
    )  # fmt: skip
    for parameter in transformer.parameters():  # zero-initialised layers would hide a mistake
        torch.nn.init.normal_(parameter, std=0.1) if parameter.abs().max() == 0 else None
    pipe = PTDiTPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), transformer=transformer,
        vae=AutoencoderKLOpenSoraPlan(hidden_size=8, hidden_size_mult=(1,) * 4, num_res_blocks=1, norm_num_groups=4),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "bf16"
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return folder


def outputs(text_encoder, transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of fixed tokens, and what the transformer makes of fixed latents and fixed text."""
    ids = torch.tensor([[5, 6, 7, 9, 1]])
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((1, 4, 1, 8, 8), (1, 5, WIDTH)))
    with torch.no_grad():
        embedded = text_encoder(ids)[0].float()
        return embedded, transformer(latents, text, torch.tensor([500.0])).sample.float()


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal to noise ratio in decibels, the peak being the range of the other."""
    return float(20 * torch.log10(other.max() - other.min()) - 10 * torch.log10((one - other).square().mean()))


@pytest.fixture(scope="module")
def expected(model):
    pipe = PTDiTPipeline.from_pretrained(model, dtype=torch.bfloat16)
    return outputs(pipe.text_encoder, pipe.transformer)


def assert_near(found, expected, least: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert least < psnr(one, other) < 200  # not equal either: something was rounded


def file_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_an_fp8_folder_loads_as_bf16_with_rounded_weights_and_can_stay_fp8(model, expected, tmp_path):
    lines = []
    quantize(model, tmp_path / "fp8", "fp8", report=lines.append)
    assert "as fp8" in lines[0] and len(lines) == 2
    for name in ("transformer", "text_encoder"):
        assert file_size(tmp_path / "fp8" / name) < 0.75 * file_size(model / name)
    pipe = PTDiTPipeline.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    found = outputs(pipe.text_encoder, pipe.transformer)
    assert_near(found, expected, 20)

    for part in (pipe.text_encoder, pipe.transformer):
        store_in_fp8(part, torch.bfloat16)
    formats = {name: weight.dtype for name, weight in pipe.transformer.named_parameters()}
    assert formats["transformer_blocks.0.attn1.to_q.weight"] == torch.float8_e4m3fn
    assert formats["adaln_single.linear.weight"] == torch.bfloat16
    assert formats["transformer_blocks.0.scale_shift_table"] == torch.float32  # small, and kept exact
    for part in (
        pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo,
        pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q,
    ):
        assert part.weight.dtype == torch.float8_e4m3fn
    again = outputs(pipe.text_encoder, pipe.transformer)
    assert_near(again, expected, 20)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_loading_straight_into_fp8_gives_the_same_numbers_as_casting_a_loaded_model(model, compute):
    pipe = PTDiTPipeline.from_pretrained(model, dtype=compute)
    slow = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    for name, expected in slow.items():
        store_in_fp8(expected, compute)
        found, expected = load_in_fp8(model, name, compute).state_dict(), expected.state_dict()
        assert {name: value.dtype for name, value in found.items()} == {k: v.dtype for k, v in expected.items()}
        assert all(torch.equal(value.float(), expected[name].float()) for name, value in found.items())


@needs_torchao
def test_an_int8_folder_loads_by_itself_and_stays_int8(model, expected, tmp_path):
    quantize(model, tmp_path / "int8", "int8")
    for name in ("transformer", "text_encoder"):
        assert file_size(tmp_path / "int8" / name) < 0.8 * file_size(model / name)
    pipe = PTDiTPipeline.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    for weight in (
        pipe.transformer.transformer_blocks[0].attn1.to_q.weight,
        pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight,
    ):
        assert type(weight).__name__ == "Int8Tensor"
    assert_near(outputs(pipe.text_encoder, pipe.transformer), expected, 30)
    with pytest.raises(ConversionError, match="quantized already"):
        quantize(tmp_path / "int8", tmp_path / "again", "fp8")


@needs_gguf
@pytest.mark.parametrize(("form", "least"), [("q8_0", 30), ("q4_0", 12), ("q4_k", 12)])
def test_gguf_files_load_as_single_files_under_their_architectures(model, expected, tmp_path, form, least):
    import gguf
    from transformers import T5Config, T5EncoderModel

    quantize(model, tmp_path / "out", form)
    assert sorted(os.listdir(tmp_path / "out")) == [f"text_encoder-{form}.gguf", f"transformer-{form}.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / f"transformer-{form}.gguf")
    assert str(bytes(reader.fields["general.architecture"].parts[-1]), "utf-8") == "ptdit"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    # rows of 96 numbers do not fill Q4_K's blocks of 256
    assert kinds["transformer_blocks.0.attn1.to_q.weight"] == {"q4_k": "Q5_0"}.get(form, form.upper())
    assert kinds["scale_shift_table"] == kinds["pos_embed.proj.weight"] == "F32"
    transformer = PTDiTTransformer3DModel.from_single_file(
        tmp_path / "out" / f"transformer-{form}.gguf", dtype=torch.bfloat16
    )
    assert transformer.config.window_size == [1, 2, 2]  # the file knows it
    text_encoder = T5EncoderModel.from_pretrained(
        tmp_path / "out", gguf_file=f"text_encoder-{form}.gguf", dtype=torch.bfloat16,
        config=T5Config.from_pretrained(model / "text_encoder"),  # without it transformers takes ReLU for GELU
    )  # fmt: skip
    assert text_encoder.config.dense_act_fn == "gelu_new"
    assert_near(outputs(text_encoder, transformer), expected, least)


def reference_q4_k(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that the gguf package reads from our Q4_K."""
    import gguf

    packed = quantize_q4_k(weight)
    assert packed.dtype == torch.uint8 and packed.shape[-1] * 256 == weight.shape[-1] * 144
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_K))


@needs_gguf
def test_q4_k_is_read_back_by_gguf_and_by_diffusers_and_beats_the_other_formats_of_its_size():
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    found = reference_q4_k(weight)
    error = (found - weight).square().mean()
    for other, share in ((gguf.GGMLQuantizationType.Q4_0, 0.75), (gguf.GGMLQuantizationType.Q4_1, 0.9)):
        theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), other), other))
        assert error < share * (theirs - weight).square().mean()
    parameter = GGUFParameter(quantize_q4_k(weight), quant_type=gguf.GGMLQuantizationType.Q4_K)
    assert (dequantize_gguf_tensor(parameter).float() - found).abs().max() < 5e-4  # diffusers unpacks in fp16


@needs_gguf
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 0.1])
def test_q4_k_of_equal_numbers_is_that_number(value):
    weight = torch.full((2, 256), value)
    assert torch.allclose(reference_q4_k(weight), weight, rtol=1e-3)


@needs_gguf
def test_a_gguf_file_has_its_configuration_also_as_a_tensor_for_readers_that_pass_on_nothing_else(tmp_path):
    import gguf

    folder = embedded_model_path("shapes-128")
    quantize(folder, tmp_path / "out", "q8_0", components=("transformer",))
    reader = gguf.GGUFReader(tmp_path / "out/transformer-q8_0.gguf")
    shapes = {tensor.name: torch.empty([int(size) for size in reversed(tensor.shape)]) for tensor in reader.tensors}
    (packed,) = (tensor.data for tensor in reader.tensors if tensor.name == PACKED_CONFIG)
    config = loaded_transformer_config(shapes | {PACKED_CONFIG: torch.from_numpy(packed.copy())})
    assert (config["num_attention_heads"], config["num_windows"]) == (3, 16)
    expected = folder_config(folder)
    assert (config["latent_scale"], config["base_tokens"]) == (expected["latent_scale"], expected["base_tokens"])


@needs_gguf
def test_a_gguf_file_without_our_configuration_is_known_by_its_shapes(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "GGUF_CONFIG", "ptdit.other")
        patch.setattr(module, "pack_config", lambda config: pack_config({}))
        quantize(model, tmp_path / "out", "q8_0", components=("transformer",))
    transformer = PTDiTTransformer3DModel.from_single_file(
        tmp_path / "out" / "transformer-q8_0.gguf", num_attention_heads=4, window_size=(1, 2, 2)
    )
    assert (transformer.config.num_layers, transformer.config.attention_head_dim) == (2, 24)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(model, tmp_path, monkeypatch):
    with pytest.raises(ConversionError, match="no format 'q3_k'; choose one of int8, fp8, q8_0"):
        quantize(model, tmp_path / "out", "q3_k")
    with pytest.raises(ConversionError, match="no model folder"):
        quantize(tmp_path, tmp_path / "out", "fp8")
    shutil.copytree(model, tmp_path / "part", ignore=shutil.ignore_patterns("text_encoder"))
    with pytest.raises(ConversionError, match="no weights of the text encoder"):
        quantize(tmp_path / "part", tmp_path / "out", "fp8")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConversionError, match="exists; name another folder"):
        quantize(model, tmp_path / "there", "fp8")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for form, package in (("int8", "torchao"), ("q8_0", "gguf")):
        with pytest.raises(ConversionError, match=f"pip install {package}"):
            quantize(model, tmp_path / "out", form)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_weights", full)
    with pytest.raises(OSError, match="No space"):
        quantize(model, tmp_path / "out", "fp8")
    assert sorted(os.listdir(tmp_path)) == ["part", "there"]


def test_only_the_named_component_changes(model, tmp_path):
    quantize(model, tmp_path / "fp8", "fp8", components=("transformer",))
    name = "text_encoder/model.safetensors"
    assert (tmp_path / "fp8" / name).read_bytes() == (model / name).read_bytes()
    written = load_file(tmp_path / "fp8" / "transformer" / "diffusion_pytorch_model.safetensors")
    original = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.float8_e4m3fn in {value.dtype for value in written.values()}
    assert all(torch.equal(value, original[name].to(value.dtype)) for name, value in written.items())


@pytest.mark.parametrize("words", [("fp8",), pytest.param(("int8",), marks=needs_torchao)])
def test_the_command_generates_with_quantized_weights(model, tmp_path, words, capsys):
    from PIL import Image

    for extra in ((), ("--quantize", *words)):
        target = tmp_path / f"{len(extra)}.png"
        fixed = ["--model", str(model), "--device", "cpu", "--dtype", "bf16", "--steps", "2", "--output", str(target)]
        assert main(["generate", "a red circle", *fixed, *extra]) == 0
    assert f"quantize: {words[0]}" in capsys.readouterr().out
    one, other = (Image.open(tmp_path / name) for name in ("0.png", "2.png"))
    assert other.info["quantize"] == words[0] and "quantize" not in one.info
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize(("form", "package"), [("int8", "torchao"), ("fp8", "torch"), ("q8_0", "gguf")])
def test_a_smaller_dit_loads_and_computes_nearly_the_same(tmp_path, form, package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    transformer = DiT2DModel(num_attention_heads=2, attention_head_dim=32, num_layers=2, sample_size=8, num_classes=3)
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    ClassToImagePipeline(transformer, tiny_vae(), official_scheduler()).save_pretrained(tmp_path / "dit")
    quantize(tmp_path / "dit", tmp_path / "small", form, ("transformer",))
    if form == "q8_0":
        (path,) = (tmp_path / "small").glob("*.gguf")
        small = DiT2DModel.from_single_file(
            str(path), quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32)
        )
        assert small.blocks[0].attn.qkv.weight.dtype == torch.uint8
    else:
        small = ClassToImagePipeline.from_pretrained(tmp_path / "small").transformer
    latents, labels = torch.randn(1, 4, 8, 8), torch.tensor([1])
    with torch.no_grad():
        models = small, transformer
        found, expected = (one(latents.to(one.dtype), torch.tensor([500.0]), labels).sample for one in models)
    assert 25 < psnr(found.float(), expected) < 200
