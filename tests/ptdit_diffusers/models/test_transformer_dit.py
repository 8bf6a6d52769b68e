"""DiT as a model of diffusers: saving, other forms of weights, LoRA, backends, memory, compilation, bad input."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import save_file
from torch import nn

from ptdit_diffusers.core.backbones.dit_parameters import BLOCK_TYPES
from ptdit_diffusers.core.checkpoint_names import ConversionError
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from tests.ptdit_diffusers import dit_goldens
from tests.ptdit_diffusers.models.test_transformer_memory import Int8Linear
from tests.ptdit_diffusers.offloading import GROUPS, check_offloading

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 3}
LINEAR = ["qkv", "proj", "fc1", "fc2"]


def tiny(**options) -> DiT2DModel:
    torch.manual_seed(0)
    transformer = DiT2DModel(**{**TINY, **options}).eval()
    for parameter in transformer.parameters():  # also those that begin at zero
        nn.init.normal_(parameter, std=0.2)
    return transformer


def sizes(transformer: DiT2DModel) -> dict[str, object]:
    return {name: value for name, value in transformer.config.items() if not name.startswith("_")}


def arguments(height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "timestep": torch.tensor([900, 12]),
        "class_labels": torch.tensor([2, 3]),
    }


@torch.no_grad()
def relative_error(transformer: nn.Module, reference: torch.Tensor) -> float:
    return float((transformer(**arguments()).sample - reference).norm() / reference.norm())


def folder_of_diffusers(folder, case="dit_p2", **changes):
    """A folder as the Hub has it: pickled weights of diffusers' class, and a configuration of its older name."""
    sizes = dit_goldens.config(case)
    config = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "cross_attention_dim": None,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": sizes["num_classes"],
        **{name: value for name, value in sizes.items() if name != "num_classes"},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(dit_goldens.diffusers_weights(case) | changes, folder / "diffusion_pytorch_model.bin")
    return folder


# --- loading and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_saving_and_loading_keeps_numbers_and_configuration(tmp_path, block_type):
    transformer = tiny(block_type=block_type)
    transformer.save_pretrained(tmp_path)
    again = DiT2DModel.from_pretrained(tmp_path)
    assert sizes(again) == sizes(transformer) and again.config.block_type == block_type
    assert relative_error(again, transformer(**arguments()).sample) == 0
    half = DiT2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.pos_embed.dtype == torch.float32
    inputs = arguments() | {"hidden_states": arguments()["hidden_states"].bfloat16()}
    sample = half(**inputs).sample
    assert sample.dtype == torch.bfloat16
    assert (sample - transformer(**arguments()).sample).norm() < 0.05 * sample.norm()


@torch.no_grad()
def test_the_timestep_stays_exact_in_half_precision():
    transformer, inputs = tiny().bfloat16(), arguments() | {"hidden_states": arguments()["hidden_states"].bfloat16()}
    seen = []
    transformer.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    samples = [transformer(**inputs | {"timestep": torch.tensor([step])}).sample for step in (997, 998)]
    assert [int(timestep) for timestep in seen] == [997, 998]  # bfloat16 knows 996 and 1000
    assert not torch.equal(*samples)


def test_presets_are_models():
    with torch.device("meta"):
        transformer = DiT2DModel.from_preset("DiT-B/4", sample_size=64)
    assert transformer.config.num_layers == 12 and transformer.config.patch_size == 4
    assert transformer.pos_embed.shape == (1, 256, 768)


@torch.no_grad()
def test_the_form_of_diffusers_loads_and_gives_the_official_numbers_which_its_own_class_does_not(tmp_path):
    folder = folder_of_diffusers(tmp_path / "transformer")
    tensors = dit_goldens.load("dit_p2")
    inputs = tensors["in.x"], tensors["in.t"], tensors["in.y"]
    transformer = DiT2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert (transformer(*inputs).sample - tensors["out"]).abs().max() < dit_goldens.LIMIT
    assert sizes(transformer) == sizes(dit_goldens.model("dit_p2"))
    other = DiTTransformer2DModel.from_pretrained(folder).eval()
    assert (other(*inputs).sample - tensors["out"]).abs().max() > 1
    assert DiT2DModel.from_pretrained(folder, dtype=torch.float16).dtype == torch.float16
    transformer.save_pretrained(tmp_path / "official")
    again = DiT2DModel.from_pretrained(tmp_path / "official").state_dict()
    assert all(torch.equal(again[name], value) for name, value in dit_goldens.weights("dit_p2").items())


def test_blocks_that_were_trained_apart_are_refused_by_name(tmp_path):
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    changed = dit_goldens.diffusers_weights("dit_p2")[name] + 1e-6
    folder = folder_of_diffusers(tmp_path / "tuned", **{name: changed})
    with pytest.raises(ConversionError, match="tuned: transformer_blocks.1.norm1.*linear_2.bias differs from that of"):
        DiT2DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "PTDiTTransformer3DModel"},
        {"_class_name": "PixArtTransformer2DModel"},
        {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"},
    ],
)
def test_folders_of_other_models_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConversionError, match=f"holds a {config['_class_name']}, not a DiT"):
        DiT2DModel.from_pretrained(tmp_path)


def test_a_folder_with_another_position_table_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    save_file(
        tiny().state_dict() | {"pos_embed": torch.zeros(1, 16, 16)}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(ValueError, match="pos_embed is not DiT's position table"):
        DiT2DModel.from_pretrained(tmp_path)


# --- features of diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_gradient_checkpointing_gives_equal_gradients(block_type):
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny(block_type=block_type, class_dropout_prob=0.5).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        torch.manual_seed(3)  # of the dropped labels
        transformer(**arguments()).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in transformer.parameters()])
    assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(*gradients, strict=True))


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
    again.fuse_lora()
    assert torch.allclose(again(**arguments()).sample, full, atol=1e-4)


@pytest.mark.usefixtures("native_again")
@pytest.mark.parametrize("block_type", ["adaln_zero", "cross_attention"])
@torch.no_grad()
def test_every_attention_goes_through_the_dispatcher_of_diffusers(block_type):
    transformer = tiny(block_type=block_type)
    plain = transformer(**arguments()).sample
    assert len(transformer.attn_processors) == (4 if block_type == "cross_attention" else 2)
    transformer.set_attention_backend("_native_math")
    chosen = transformer(**arguments()).sample
    transformer.reset_attention_backend()
    with attention_backend("_native_math"):
        assert torch.equal(transformer(**arguments()).sample, chosen)
    assert torch.allclose(chosen, plain, atol=1e-5)
    names = set(transformer.state_dict())
    transformer.fuse_qkv_projections()  # queries, keys and values are one layer from the beginning
    assert names == set(transformer.state_dict())


@torch.no_grad()
def test_fp8_storage_keeps_large_layers_small_and_embeddings_exact():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    large = {name for name, value in transformer.state_dict().items() if value.dtype == torch.float8_e4m3fn}
    assert {name.split(".", 2)[2] for name in large} == {
        f"{layer}.{kind}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }  # fmt: skip
    assert 0 < relative_error(transformer, plain) < 0.15


@GROUPS
@torch.no_grad()
def test_group_offloading_changes_nothing(groups, tmp_path):
    transformer = tiny()
    check_offloading(transformer, lambda: transformer(**arguments()).sample, tmp_path, groups)


@torch.no_grad()
def test_offloading_by_accelerate_fetches_every_tensor():
    from accelerate import cpu_offload

    transformer = tiny()
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
    quantized = DiT2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert "Int8Tensor" in type(quantized.blocks[1].attn.qkv.weight).__name__
    assert 0 < relative_error(quantized, transformer(**arguments()).sample) < 0.05


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_steps_and_classes_share_one_graph(block_type):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    transformer = tiny(block_type=block_type)
    compiled = torch.compile(transformer, fullgraph=True, backend=backend)
    for label in range(3):
        inputs = arguments() | {"timestep": torch.tensor([label * 300]), "class_labels": torch.tensor([label, 3])}
        assert torch.allclose(compiled(**inputs).sample, transformer(**inputs).sample, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_blocks_share_a_graph(block_type="adaln_zero"):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    transformer = tiny(num_layers=3)
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    for size in ((8, 8), (6, 12), (4, 10)):
        transformer(**arguments(*size))
    assert len(graphs) == 2  # the first size, and all others
    torch._dynamo.reset()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 4, 1, 8, 8)},
            r"shape \(2, 4, 1, 8, 8\); it must be \(batch, channels, height",
        ),
        (
            {"hidden_states": torch.zeros(2, 4, 8, 7)},
            "latent width=7 is not a multiple of the patch size 2; .* 6 or 8",
        ),
        ({"class_labels": torch.tensor([0, 4])}, "class label 4 must be 0 to 3, 3 being the null class; nearest: 3"),
        ({"class_labels": torch.tensor([-1, 0])}, "class label -1 must be 0 to 3, .*nearest: 0"),
        ({"class_labels": torch.tensor([0, 1, 2])}, "class_labels has 3 members for a batch of 2; pass 2 or one"),
        ({"timestep": torch.tensor([0, 1, 2])}, "timestep has 3 members for a batch of 2; pass 2 or one"),
    ],
)
def test_illegal_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments() | inputs)


@torch.no_grad()
def test_one_timestep_and_one_label_serve_all_samples():
    transformer, latents = tiny(), arguments()["hidden_states"]
    expected = transformer(latents, torch.tensor([7, 7]), torch.tensor([1, 1])).sample
    for time, label in ((7, 1), (torch.tensor(7), torch.tensor(1)), (torch.tensor([7.0]), torch.tensor([1]))):
        assert torch.allclose(transformer(latents, time, label, return_dict=False)[0], expected, atol=1e-6)


def test_a_position_table_that_fills_memory_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="sample_size=1000000 with width 16 .* at most 268,435,456 .*; nearest: 8192"):
        DiT2DModel(**TINY | {"sample_size": 10**6})
