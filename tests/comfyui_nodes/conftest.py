"""A real ComfyUI with tiny random models, shared by all tests of this folder that need one."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from ptdit_diffusers import DiT2DModel, official_scheduler
from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.backbones.vae import PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG
from ptdit_diffusers.core.configuration import pack_config
from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from tests.ptdit_diffusers import diffit_goldens, dit_goldens
from tests.ptdit_diffusers.class_models import tiny_diffit_pipeline, tiny_pipeline

from .graph import Server

NETWORK = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "patch_size": 2,
    "sample_size": 8,
    "caption_channels": 128,
    "window_size": (1, 2, 2),
    "proxy_ratio": (1, 2, 2),
    "shift_window": True,
    "proxy_mode": "mean",
    "num_windows": 4,
    "scrambled_positions": False,
    "additional_conditions": False,
}
VAE = {"hidden_size": 8, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1, "norm_num_groups": 4}
LORA_LAYERS = ("transformer_blocks.0.proxy_attn1.to_q", "transformer_blocks.1.attn2.to_out.0")


def random_network(seed: int, **changes: object) -> dict[str, torch.Tensor]:
    """Weights of a tiny network in which every layer matters."""
    torch.manual_seed(seed)
    backbone = PTDiTBackbone()
    backbone.build(PTDiTParameters(**NETWORK | changes))
    return {
        name: torch.randn_like(value) * (0.2 if value.ndim > 1 else 0.05)
        for name, value in backbone.state_dict().items()
    }


def random_lora(naming: str) -> dict[str, torch.Tensor]:
    """The same LoRA of rank 4 under the names of one kind of file."""
    down, up = (".lora_down.weight", ".lora_up.weight") if naming == "kohya" else (".lora_A.weight", ".lora_B.weight")
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in LORA_LAYERS:
        key = {
            "diffusers": f"transformer.{layer}",
            "comfy": f"diffusion_model.{layer}",
            "kohya": f"lora_unet_{layer.replace('.', '_')}",
        }[naming]
        weights[key + down] = torch.randn(4, 32, generator=generator)
        weights[key + up] = torch.randn(32, 4, generator=generator)
        if naming == "kohya":
            weights[f"{key}.alpha"] = torch.tensor(4.0)
    return weights


def write_text_lora(folder: Path) -> None:
    """A LoRA on the text encoder of shapes-128: for diffusers and for ComfyUI."""
    from lora.export import COMFYUI_TEXT_PREFIX  # it imports all that a training needs

    shapes = load_file(embedded_model_path("shapes-128") / "text_encoder/model.safetensors")
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, value in shapes.items():
        if name.endswith(("SelfAttention.q.weight", "SelfAttention.o.weight", "DenseReluDense.wo.weight")):
            layer = name.removesuffix(".weight")
            weights[f"{layer}.lora_A.weight"] = torch.randn(2, value.shape[1], generator=generator) * 0.1
            weights[f"{layer}.lora_B.weight"] = torch.randn(value.shape[0], 2, generator=generator) * 0.1
    for prefix, name in (("text_encoder.", "text_diffusers"), (COMFYUI_TEXT_PREFIX, "text_comfyui")):
        save_file({f"{prefix}{key}": value for key, value in weights.items()}, folder / f"{name}.safetensors")


OTHER_PACK = """
import functools
import comfy.model_detection

original = comfy.model_detection.detect_unet_config


@functools.wraps(original)
def detect_unet_config(*args, **kwargs):
    return original(*args, **kwargs)


comfy.model_detection.detect_unet_config = detect_unet_config
NODE_CLASS_MAPPINGS = {}
"""


def write_packs(custom_nodes: Path) -> None:
    """Two more packs that wrap ComfyUI's detection, one with `probes`, and ComfyUI-GGUF if COMFYUI_GGUF names it."""
    for name in ("a_pack", "z_pack"):
        (custom_nodes / name).mkdir(parents=True)
        (custom_nodes / name / "__init__.py").write_text(OTHER_PACK)
    probes = (Path(__file__).parent / "probes.py").read_text(encoding="utf-8")
    (custom_nodes / "z_pack/__init__.py").write_text(OTHER_PACK + probes, encoding="utf-8")
    if "COMFYUI_GGUF" in os.environ:
        (custom_nodes / "ComfyUI-GGUF").symlink_to(os.environ["COMFYUI_GGUF"], target_is_directory=True)


def write_gguf(models: Path) -> None:
    """One block at the released width, as safetensors and as GGUF; the embedded model's T5 as GGUF."""
    from ptdit_diffusers.conversion.quantize import quantize

    folder = models / "diffusers/wide"
    (folder / "transformer").mkdir(parents=True)
    network = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 1}
    weights = {name: value / 6 for name, value in random_network(6, **network).items()}
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")
    config = NETWORK | network | {"_class_name": "PTDiTTransformer3DModel", "use_additional_conditions": False}
    del config["additional_conditions"]
    (folder / "transformer/config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PTDiTPipeline"}))
    for form in ("q8_0", "q4_k"):
        quantize(folder, models / f"gguf_{form}", form, components=("transformer",))
        (models / f"gguf_{form}/transformer-{form}.gguf").rename(models / f"diffusion_models/wide-{form}.gguf")
    (models / "diffusion_models/wide.safetensors").symlink_to(
        folder / "transformer/diffusion_pytorch_model.safetensors"
    )
    (models / "text_encoders").mkdir(exist_ok=True)
    quantize(embedded_model_path("shapes-128"), models / "gguf_text", "q8_0", components=("text_encoder",))
    (models / "gguf_text/text_encoder-q8_0.gguf").rename(models / "text_encoders/small.gguf")


def write_class_models(models: Path) -> None:
    """Tiny trained models of 10 classes and 64 px, with the VAE of `shapes-128`; a DiT in files of two forms."""
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(embedded_model_path("shapes-128") / "vae")
    tiny_pipeline(official_scheduler("ddim"), vae=vae).save_pretrained(models / "diffusers/dit")
    tiny_diffit_pipeline(official_scheduler("ddim"), vae=vae).save_pretrained(models / "diffusers/diffit")
    weights, sizes = dit_goldens.weights("dit_sampler"), dit_goldens.config("dit_sampler")
    heads = {PACKED_CONFIG: pack_config({"num_attention_heads": sizes["num_attention_heads"], "sample_size": 8})}
    save_file(weights | heads, models / "diffusion_models/dit.safetensors")
    save_file(weights, models / "diffusion_models/dit_without_heads.safetensors", metadata={"format": "pt"})
    incomplete = {name: value for name, value in weights.items() if name != "blocks.1.mlp.fc2.bias"}
    save_file(incomplete | heads, models / "diffusion_models/dit_incomplete.safetensors")
    save_file(diffit_goldens.weights("diffit_sampler"), models / "diffusion_models/diffit.safetensors")
    torch.manual_seed(4)
    known_width = DiT2DModel.from_preset("DiT-S/2", num_layers=1, sample_size=8, num_classes=10)
    torch.save(known_width.state_dict(), models / "diffusion_models/dit_official.pt")
    flow = DiT2DModel(**sizes | {"out_channels": 4})
    torch.nn.init.normal_(flow.final_layer.linear.weight, std=0.1)
    tiny_pipeline(
        FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=flow, guidance_channels=None
    ).save_pretrained(models / "diffusers/dit_flow")
    layer = "blocks.1.attn.qkv"
    lora = {
        f"transformer.{layer}.lora_A.weight": torch.randn(2, weights[f"{layer}.weight"].shape[1]),
        f"transformer.{layer}.lora_B.weight": torch.randn(weights[f"{layer}.weight"].shape[0], 2),
    }
    save_file(lora, models / "loras/dit.safetensors")


def write_bad_folders(folders: Path, good: Path) -> None:
    """Folders that lack a weight, or whose parts do not fit each other or their weights."""
    for name in ("incomplete", "of_two_models", "other_layers"):
        shutil.copytree(good, folders / name)
    file = folders / "incomplete/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "proj_out.bias"}, file)
    (folders / "of_two_models/vae").mkdir()
    (folders / "of_two_models/vae/config.json").write_text(json.dumps({"z_channels": 8}))
    config = folders / "other_layers/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"caption_channels": 64}))


def write_models(models: Path) -> None:
    """Files that the graphs name."""
    for name in ("diffusion_models", "checkpoints", "loras", "vae"):
        (models / name).mkdir(parents=True, exist_ok=True)
    video = {"sample_frames": 5, **NETWORK}
    one, two = random_network(0), random_network(1)
    config = {PACKED_CONFIG: pack_config(video)}
    save_file(one | config, models / "diffusion_models/tiny.safetensors")
    save_file(two | config, models / "diffusion_models/other.safetensors")
    larger = {"num_attention_heads": 3, "num_layers": 3}
    save_file(
        random_network(2, **larger) | {PACKED_CONFIG: pack_config(video | larger)},
        models / "diffusion_models/larger.safetensors",
    )
    save_file(one, models / "diffusion_models/no_config.safetensors")
    torch.save(one | config, models / "diffusion_models/tiny.pt")
    prefixed = {f"model.diffusion_model.{name}": value for name, value in (one | config).items()}
    save_file(prefixed, models / "checkpoints/tiny.safetensors")
    for naming in ("diffusers", "comfy", "kohya"):
        save_file(random_lora(naming), models / f"loras/{naming}.safetensors")
    write_text_lora(models / "loras")
    torch.manual_seed(3)
    vae = PTDiTVAEBackbone()
    vae.build(VAEParameters(**VAE))
    save_file(vae.state_dict(), models / "vae/tiny.safetensors", metadata={"config": json.dumps(VAE)})
    official = PTDiTVAEBackbone()
    official.build(VAEParameters(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1))
    nested = {f"module.{name}": value for name, value in official.state_dict().items()}
    torch.save({"ema_state_dict": nested, "epoch": 3}, models / "vae/official.ckpt")
    save_file(one, models / "vae/no_vae.safetensors")
    save_file(random_lora("comfy"), models / "diffusion_models/lora.safetensors")
    (models / "vae/garbage.ckpt").write_bytes(b"no checkpoint")
    text = {"caption_channels": 96}
    save_file(
        random_network(0, **text) | {PACKED_CONFIG: pack_config(video | text)},
        models / "diffusion_models/other_text.safetensors",
    )
    bare = models / "diffusers/bare"
    (bare / "transformer").mkdir(parents=True)
    (bare / "model_index.json").write_text(json.dumps({"_class_name": "PTDiTPipeline"}))
    (bare / "transformer/config.json").write_text(json.dumps(video))
    save_file(one, bare / "transformer/diffusion_pytorch_model.safetensors")
    outside = models / "diffusers/outside"
    shutil.copytree(bare, outside)
    write_class_models(models)
    write_bad_folders(models / "diffusers", bare)
    weight_map = {"weight_map": {"proj_out.weight": "../../../vae/tiny.safetensors"}}
    (outside / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(weight_map))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; tests that ask for it are skipped where COMFYUI_DIR names none."""
    folder = os.environ.get("COMFYUI_DIR")
    if not folder or not (Path(folder) / "main.py").is_file():
        pytest.skip("COMFYUI_DIR names no ComfyUI folder")
    base = tmp_path_factory.mktemp("comfyui")
    write_models(base / "models")
    write_packs(base / "custom_nodes")
    if "COMFYUI_GGUF" in os.environ:
        write_gguf(base / "models")
    running = Server(Path(folder), base)
    yield running
    running.stop()
