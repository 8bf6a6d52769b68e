"""Checkpoints of DiT in every form: single files, `ptdit convert`, and what is refused, with nothing written."""

import argparse
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ptdit_diffusers import ClassToImagePipeline, DiT2DModel
from ptdit_diffusers.conversion.folder import convert
from ptdit_diffusers.core.backbones.dit import grid_positions
from ptdit_diffusers.core.backbones.dit_parameters import BLOCK_TYPES
from ptdit_diffusers.core.checkpoint_names import ConversionError
from tests.ptdit_diffusers import dit_goldens
from tests.ptdit_diffusers.models.test_transformer_dit import folder_of_diffusers, tiny

CASE, HEADS = "dit_p2", 4
GOLDEN = dit_goldens.load(CASE)
WEIGHTS = dit_goldens.weights(CASE)


def error_of(transformer: DiT2DModel) -> float:
    with torch.no_grad():
        return (transformer(GOLDEN["in.x"], GOLDEN["in.t"], GOLDEN["in.y"]).sample - GOLDEN["out"]).abs().max().item()


def training_checkpoint() -> dict:
    """What DiT's training script saves: the weights, their averages, the optimizer and the arguments."""
    raw = {name: value + 0.1 for name, value in WEIGHTS.items()} | {"pos_embed": WEIGHTS["pos_embed"]}
    averages = WEIGHTS | {"pos_embed": WEIGHTS["pos_embed"] * (1 - 1.6e-4)}
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=10, vae="ema")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"model": raw, "ema": averages, "opt": optimizer, "args": arguments}


def write(form: str, folder) -> str:
    """A checkpoint in one of the forms that exist; its path."""
    path = folder / f"{form}.pt"
    if form in ("half", "bfloat"):
        path = folder / f"{form}.safetensors"
        save_file({name: value.to(getattr(torch, f"{form}16" if form == "bfloat" else "float16"))
                   for name, value in WEIGHTS.items()}, path)  # fmt: skip
    elif form == "diffusers":
        path = folder_of_diffusers(folder / "transformer", CASE) / "diffusion_pytorch_model.bin"
    else:
        content = {
            "flat": WEIGHTS,
            "wrapped": {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()},
            "without_table": {name: value for name, value in WEIGHTS.items() if name != "pos_embed"},
            "training": training_checkpoint(),
            "legacy": training_checkpoint(),
        }[form]
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return str(path)


FORMS = ("flat", "wrapped", "training", "legacy", "half", "bfloat", "diffusers")


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_single_file_of_any_form_gives_the_official_numbers(tmp_path, form):
    transformer = DiT2DModel.from_single_file(write(form, tmp_path), num_attention_heads=HEADS)
    # golden weights are exact in float16; in bfloat16 they are not
    assert error_of(transformer.float()) < (0.5 if form == "bfloat" else dit_goldens.LIMIT)
    assert torch.equal(transformer.pos_embed, WEIGHTS["pos_embed"])  # the formula's, whatever the file has
    assert transformer.config.sample_size == 16 and transformer.config.num_classes == 10


@pytest.mark.parametrize("form", FORMS)
def test_convert_writes_a_folder_of_the_class_conditional_pipeline(tmp_path, form):
    lines = []
    convert(tmp_path / "out", write(form, tmp_path), num_heads=HEADS, report=lines.append)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert error_of(pipe.transformer) < (0.5 if form == "bfloat" else dit_goldens.LIMIT)
    assert pipe.vae is None and pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.config.guidance_channels == 3
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(stored) == set(WEIGHTS) and torch.equal(stored["pos_embed"], WEIGHTS["pos_embed"])
    assert any(
        "adaln_zero blocks, 4 heads (as asked), 10 classes, latents of 16, with learned" in line for line in lines
    )
    assert "ClassToImagePipeline.from_pretrained(folder, vae=...)" in lines[-1]
    assert any("in the form of diffusers" in line for line in lines) == (form == "diffusers")


def test_a_file_without_a_position_table_is_taken_for_the_size_that_is_given(tmp_path):
    path = write("without_table", tmp_path)
    transformer = DiT2DModel.from_single_file(path, num_attention_heads=HEADS, sample_size=16)
    assert error_of(transformer) < dit_goldens.LIMIT
    assert DiT2DModel.from_single_file(path, num_attention_heads=HEADS).config.sample_size == 32


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_every_kind_of_block_is_recognized(tmp_path, block_type):
    transformer = tiny(block_type=block_type)
    save_file(transformer.state_dict(), tmp_path / "model.safetensors")
    again = DiT2DModel.from_single_file(tmp_path / "model.safetensors", num_attention_heads=2)
    assert again.config.block_type == block_type
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in transformer.state_dict().items())


def test_a_saved_folder_beside_the_file_gives_the_heads(tmp_path):
    dit_goldens.model(CASE).save_pretrained(tmp_path)
    transformer = DiT2DModel.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert transformer.config.num_attention_heads == HEADS and error_of(transformer) < dit_goldens.LIMIT


def test_a_dictionary_of_weights_goes_the_way_of_diffusers(tmp_path):
    dit_goldens.model(CASE).save_config(tmp_path)
    for content in (WEIGHTS, training_checkpoint(), dit_goldens.diffusers_weights(CASE)):
        assert error_of(DiT2DModel.from_single_file(content, config=str(tmp_path))) < dit_goldens.LIMIT


def test_class_names_travel_with_a_folder_of_diffusers(tmp_path):
    path = write("diffusers", tmp_path / "hub")
    names = {"0": "tench, Tinca tinca", "1": "red star"}
    (tmp_path / "hub" / "model_index.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
    convert(tmp_path / "out", path)
    assert ClassToImagePipeline.from_pretrained(tmp_path / "out").get_label_ids("tinca tinca") == [0]


@pytest.mark.parametrize("original", [False, True])
def test_image_vaes_come_along_under_both_kinds_of_names(tmp_path, original):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32, 32, 64, 64), layers_per_block=1, **blocks).eval()
    weights = original_names(vae.state_dict()) if original else vae.state_dict()
    torch.save(
        {"state_dict": weights | {"loss.logvar": torch.zeros(1)}} if original else weights, tmp_path / "vae.ckpt"
    )
    convert(tmp_path / "out", write("flat", tmp_path), tmp_path / "vae.ckpt", num_heads=HEADS)
    again = ClassToImagePipeline.from_pretrained(tmp_path / "out").vae
    assert type(again) is AutoencoderKL and again.config.scaling_factor == 0.18215
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the original code for a VAE of diffusers, with its 1 x 1 convolutions in the attention."""
    renamed = {}
    for name, value in weights.items():
        attention = "mid_block.attentions.0" in name
        for new, old in (
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("down_blocks.", "down."),
            ("resnets.", "block."),
        ):
            name = name.replace(new, old)
        if "up_blocks." in name:
            before, number, after = (
                name.partition("up_blocks.")[0],
                name.split("up_blocks.")[1][0],
                name[name.index("up_blocks.") + 11 :],
            )
            name = f"{before}up.{3 - int(number)}{after}"
        renamed[name] = value[..., None, None] if attention and value.ndim == 2 else value
    return renamed


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path, content, match, **options):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    for attempt in (
        lambda: DiT2DModel.from_single_file(path, num_attention_heads=HEADS, **options),
        lambda: convert(tmp_path / "out", path, num_heads=HEADS),
    ):
        with pytest.raises(ConversionError, match=match):
            attempt()
        if options:
            break
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]  # nothing half-written


def test_weights_that_are_missing_surplus_or_misshapen_are_named(tmp_path):
    content = {name: value for name, value in WEIGHTS.items() if name != "blocks.1.attn.proj.bias"}
    refused(tmp_path, content, "does not hold exactly .*seems to be DiT; 1 missing: blocks.1.attn.proj.bias")
    refused(tmp_path, WEIGHTS | {"extra": torch.zeros(1)}, "1 unexpected: extra")
    content = WEIGHTS | {"blocks.0.mlp.fc1.bias": torch.zeros(5)}
    refused(tmp_path, content, r"1 misshapen: blocks.0.mlp.fc1.bias is \(5,\), must be \(192,\)")


def test_another_position_table_is_refused(tmp_path):
    refused(tmp_path, WEIGHTS | {"pos_embed": WEIGHTS["pos_embed"] + 2e-3}, "pos_embed is not DiT's position table")
    rows_first = grid_positions(8, 8, 48).view(8, 8, 48).transpose(0, 1).reshape(1, 64, 48)
    refused(
        tmp_path, WEIGHTS | {"pos_embed": rows_first}, "pos_embed is not DiT's position table: it differs by up to"
    )


def test_a_file_for_512_px_is_refused_by_a_configuration_for_256_px(tmp_path):
    large = WEIGHTS | {"pos_embed": grid_positions(16, 16, 48)[None]}
    refused(tmp_path, large, r"latents of 16.*pos_embed is \(1, 256, 48\), must be \(1, 64, 48\)", sample_size=16)
    torch.save(large, tmp_path / "model.pt")
    transformer = DiT2DModel.from_single_file(tmp_path / "model.pt", num_attention_heads=HEADS)
    assert transformer.config.sample_size == 32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"blocks.0.attn.qkv_temb.weight": torch.zeros(144, 48)}, "it seems to be DiffiT"),
        ({"blocks.0.cross_attn.q_linear.weight": torch.zeros(48, 48)}, "it seems to be PixArt"),
        ({"transformer_blocks.0.proxy_attn1.to_q.weight": torch.zeros(48, 48)}, "a PT-DiT transformer"),
    ],
)
def test_other_models_are_recognized(tmp_path, changes, match):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS | changes, path)
    with pytest.raises(ConversionError, match=match):
        DiT2DModel.from_single_file(path, num_attention_heads=HEADS)


def test_blocks_of_diffusers_that_were_trained_apart_are_refused_by_name(tmp_path):
    weights = dit_goldens.diffusers_weights(CASE)
    weights["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"][3, 5] += 1e-6
    refused(tmp_path, weights, "transformer_blocks.1.norm1.emb.class_embedder.* differs from that of block 0")


class Payload:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('code of a checkpoint was run')",))


@pytest.mark.parametrize("place", ["beside", "in the arguments"])
def test_no_code_in_a_training_checkpoint_is_run(tmp_path, place):
    content = training_checkpoint()
    if place == "beside":
        content["hook"] = Payload()
    else:
        content["args"].hook = Payload()
    refused(tmp_path, content, r"was refused: besides weights it wants to run code \(.*exec\)")


def test_heads_that_weights_do_not_show_are_asked_for(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="width 48 is no known size; known: 384 .6 heads.*--num-heads"):
        convert(tmp_path / "out", tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="num_attention_heads=5 does not divide the width 48; nearest: 4"):
        convert(tmp_path / "out", tmp_path / "model.pt", num_heads=5)
    with pytest.raises(ConversionError, match="is a DiT, which --window-size does not fit"):
        convert(tmp_path / "out", tmp_path / "model.pt", num_heads=4, window_size=(1, 2, 2))


def test_a_vae_with_other_channels_is_refused(tmp_path):
    vae = AutoencoderKL(latent_channels=16, block_out_channels=(32,), layers_per_block=1)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    torch.save(WEIGHTS, tmp_path / "model.pt")
    narrow = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(ConversionError, match=r"narrow.safetensors: num_channels \(4\) must be divisible by"):
        convert(tmp_path / "out", tmp_path / "model.pt", tmp_path / "narrow.safetensors", num_heads=4)
    with pytest.raises(ConversionError, match="has 16 latent channels, but the transformer has 4"):
        convert(tmp_path / "out", tmp_path / "model.pt", tmp_path / "vae.safetensors", num_heads=4)
