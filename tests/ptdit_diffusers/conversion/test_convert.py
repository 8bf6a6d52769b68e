"""`ptdit convert` on small files of the official layouts: what it writes, what it says, what it refuses."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion import containers, folder, networks, text, writing
from ptdit_diffusers.core import configuration
from ptdit_diffusers.core.checkpoint_names import ConversionError, kind_of
from ptdit_diffusers.core.configuration import pack_config
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from tests.conftest import word_tokenizer
from tests.ptdit_diffusers import goldens

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
SMALL = ("--num-heads", "4", "--window-size", "1", "4", "4")  # what the golden weights do not tell


def golden_weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dit_weights.safetensors")


def official_pt(path: Path) -> Path:
    """The golden weights as a training checkpoint: nested, with a wrapper's prefix, with the position buffer."""
    state = {f"module.{name}": value for name, value in golden_weights().items()}
    torch.save({"model": state, "epoch": 3}, path)
    return path


def small_vae() -> AutoencoderKLOpenSoraPlan:
    torch.manual_seed(0)
    return AutoencoderKLOpenSoraPlan(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)


def small_t5(width: int = 32, gated: bool = True):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    kind = "gated-gelu" if gated else "relu"
    return T5EncoderModel(
        T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj=kind)
    ).eval()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """One file or folder of each kind: transformer .pt, VAE .ckpt, T5 as a single file and as a folder, tokenizer."""
    place = tmp_path_factory.mktemp("inputs")
    generator = {f"module.{name}": value for name, value in small_vae().state_dict().items()}
    generator["loss.logvar"] = torch.zeros(1)
    torch.save({"state_dict": {"gen_model": generator}, "step": 1}, place / "checkpoint.ckpt")
    t5 = small_t5()
    single = {name: value.clone() for name, value in t5.state_dict().items() if name != text.TIED_TABLE}
    save_file({name: value.half() for name, value in single.items()}, place / "t5_fp16.safetensors")
    t5.save_pretrained(place / "pipeline" / "text_encoder")
    word_tokenizer().save_pretrained(place / "pipeline" / "tokenizer")
    return {
        "transformer": official_pt(place / "official.pt"),
        "vae": place / "checkpoint.ckpt",
        "t5_file": place / "t5_fp16.safetensors",
        "t5_folder": place / "pipeline",
    }


def refusal(capsys, tmp_path: Path, *words: str) -> str:
    """Runs a conversion that must fail with one line, and must leave nothing in the output's folder."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    before = sorted(os.listdir(place))
    capsys.readouterr()  # of what came before
    assert main(["convert", "--output", str(place / "model"), *map(str, words)]) == 2
    assert sorted(os.listdir(place)) == before
    errors = capsys.readouterr().err
    assert errors.startswith("ptdit: ") and errors.count("\n") == 1
    return errors


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(inputs, tmp_path_factory) -> Path:
    """The transformer of the goldens, converted as the command does it."""
    output = tmp_path_factory.mktemp("converted") / "model"
    assert main(["convert", "--transformer", str(inputs["transformer"]), "--output", str(output), *SMALL]) == 0
    return output


@pytest.mark.parametrize("case", [case for case in goldens.CASES if case[:3] not in ("vii", "iv_") or "viii" in case])
def test_the_goldens_come_out_of_a_converted_official_checkpoint(converted, case):
    transformer = PTDiTTransformer3DModel.from_pretrained(converted, subfolder="transformer").eval()
    tensors, config = goldens.load(case)
    windows = {"window_size": config["compress_ratios"], "proxy_ratio": config["proxy_compress_ratios"]}
    with torch.no_grad():
        out = transformer(**goldens.inputs(tensors), **windows).sample
    assert (out - tensors[goldens.CASES[case][0]]).abs().max() < goldens.LIMIT


def test_the_official_checkpoint_can_also_be_loaded_as_a_single_file(converted, inputs):
    from ptdit_diffusers import PTDiTTransformer3DModel as Registered

    one = Registered.from_single_file(str(inputs["transformer"]), config=str(converted), subfolder="transformer")
    other = Registered.from_pretrained(converted, subfolder="transformer").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def test_the_goldens_of_the_vae_come_out_of_a_converted_checkpoint(tmp_path):
    golden = load_file(GOLDEN / "causalvae.safetensors")
    weights = {f"module.{key.removeprefix('weights.')}": value for key, value in golden.items() if "weights." in key}
    torch.save({"state_dict": {}, "ema_state_dict": weights}, tmp_path / "checkpoint.ckpt")
    words = ["--vae", str(tmp_path / "checkpoint.ckpt"), "--output", str(tmp_path / "out"), "--dtype", "fp32"]
    assert main(["convert", *words]) == 0
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(tmp_path / "out", subfolder="vae").eval()
    with torch.no_grad():
        mode = vae.encode(golden["image.pixels"]).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(golden["video9.latent_mode_scaled"] / vae.config.scaling_factor).sample
    assert (mode - golden["image.latent_mode_scaled"]).abs().max() < 2e-4
    assert (decoded - golden["video9.decoded"]).abs().max() < 2e-4


def test_extra_conditions_and_missing_shift_are_seen_in_the_weights(tmp_path):
    for case in ("vii_added_conditions", "iv_no_shift"):
        tensors, config = goldens.load(case)
        save_file(goldens.model(case).state_dict(), tmp_path / f"{case}.safetensors")
        words = ["--transformer", str(tmp_path / f"{case}.safetensors"), "--output", str(tmp_path / case), *SMALL]
        assert main(["convert", *words]) == 0
        transformer = PTDiTTransformer3DModel.from_pretrained(tmp_path / case, subfolder="transformer").eval()
        assert transformer.config.shift_window is config["shift_window"]
        with torch.no_grad():
            out = transformer(**goldens.inputs(tensors)).sample
        assert (out - tensors[goldens.CASES[case][0]]).abs().max() < goldens.LIMIT


def test_a_whole_pipeline_is_converted_and_generates(inputs, tmp_path, capsys):
    output = tmp_path / "model"
    parts = ["--transformer", inputs["transformer"], "--vae", inputs["vae"], "--text-encoder", inputs["t5_folder"]]
    assert main(["convert", *map(str, parts), "--output", str(output), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "width 48, 2 layers" in said and "4 heads (as asked)" in said and "windows 1x4x4 (as asked)" in said
    assert "under 'model'" in said and "under 'state_dict.gen_model'" in said and "tokenizer: " in said
    index = json.loads((output / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PTDiTTransformer3DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLOpenSoraPlan"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    scheduler = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["use_dynamic_shifting"], scheduler["base_image_seq_len"], scheduler["shift"]) == (True, 1024, 1)
    assert json.loads((output / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    picture = tmp_path / "a.png"
    words = ["a red circle", "--model", str(output), "--steps", "1", "--height", "32", "--width", "32"]
    assert main(["generate", *words, "--device", "cpu", "--output", str(picture)]) == 0
    assert picture.is_file()


def test_the_numbers_of_vae_and_text_encoder_are_kept(inputs, tmp_path):
    output = tmp_path / "model"
    words = ["--vae", inputs["vae"], "--text-encoder", inputs["t5_file"], "--output", output]
    assert main(["convert", *map(str, words)]) == 0
    written = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    original = small_vae().state_dict()
    assert set(written) == set(original) and all(torch.equal(written[name], original[name]) for name in original)

    from transformers import T5EncoderModel

    t5 = T5EncoderModel.from_pretrained(output / "text_encoder", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        assert (t5(ids)[0] - small_t5().half().float()(ids)[0]).abs().max() < 1e-4


def test_what_a_file_says_about_itself_is_in_the_converted_folder(tmp_path, inputs, capsys):
    said = {"num_attention_heads": 4, "window_size": [1, 4, 4], "proxy_ratio": [1, 2, 2], "num_windows": 16}
    packed = pack_config(said | {"base_tokens": 64, "latent_scale": 0.75, "latent_rgb": None})
    save_file(golden_weights() | {"ptdit_config": packed}, tmp_path / "saved.safetensors")
    words = ["--transformer", tmp_path / "saved.safetensors", "--vae", inputs["vae"], "--output", tmp_path / "model"]
    assert main(["convert", *map(str, words)]) == 0
    assert "4 heads (as in the file); windows 1x4x4 (as in the file), proxy ratio 1x2x2" in capsys.readouterr().out
    config = json.loads((tmp_path / "model/transformer/config.json").read_text())
    assert {name: config[name] for name in said} == said
    assert json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())["base_image_seq_len"] == 64
    assert json.loads((tmp_path / "model/vae/config.json").read_text())["scaling_factor"] == 0.75
    assert "ptdit_config" not in load_file(tmp_path / "model/transformer/diffusion_pytorch_model.safetensors")


def test_a_folder_without_some_components_says_so_and_names_them_null(inputs, tmp_path, capsys):
    output = tmp_path / "model"
    words = ["--vae", str(inputs["vae"]), "--output", str(output)]
    assert main(["convert", *words]) == 0
    index = json.loads((output / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == index["transformer"] == [None, None]
    said = capsys.readouterr().out
    assert "no transformer, text encoder, tokenizer" in said and "text_encoder=..." in said

    from ptdit_diffusers import PTDiTPipeline

    pipe = PTDiTPipeline.from_pretrained(output, transformer=None, text_encoder=None, tokenizer=None)
    assert pipe.vae.config.hidden_size == 32


def test_a_model_without_vae_is_refused_by_the_command_before_anything_is_loaded(converted, tmp_path, capsys):
    assert main(["generate", "a circle", "--model", str(converted), "--output", str(tmp_path / "a.png")]) == 2
    errors = capsys.readouterr().err
    assert "has no text_encoder, tokenizer, vae (null in model_index.json)" in errors and errors.count("\n") == 1


def test_a_number_format_can_be_chosen(inputs, tmp_path):
    output = tmp_path / "model"
    words = ["--transformer", str(inputs["transformer"]), "--output", str(output), "--dtype", "bf16", *SMALL]
    assert main(["convert", *words]) == 0
    written = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    original = golden_weights()
    assert set(written) == set(original) - {"pos_embed.pos_embed"}
    assert all(torch.equal(value, original[name].bfloat16()) for name, value in written.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"ema": state, "model": {name: value * 2 for name, value in state.items()}},
        lambda state: {"state_dict": {"gen_model": {f"model.module.{name}": value for name, value in state.items()}}},
        lambda state: {"ema_state_dict": {}, "module": state},
    ],
    ids=["flat", "state_dict", "ema", "gen_model", "module"],
)
@pytest.mark.parametrize("old_format", [False, True])
def test_every_nesting_and_prefix_gives_the_same_weights(tmp_path, wrap, old_format):
    original = golden_weights()
    torch.save(wrap(original), tmp_path / "a.pth", _use_new_zipfile_serialization=not old_format)
    part = networks.plan_transformer(tmp_path / "a.pth", 4, None, None)
    streamed = dict(part.weights.stream(part.weights.facts))
    assert set(streamed) == set(original) - {"pos_embed.pos_embed"}
    assert all(torch.equal(value, original[name]) for name, value in streamed.items())


def test_sharded_safetensors_are_read_by_their_index_and_written_in_shards(tmp_path, monkeypatch):
    original = golden_weights()
    names = sorted(original)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: original[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    monkeypatch.setattr(writing, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(containers, "RELEASE_BYTES", 50_000)
    folder.convert(tmp_path / "out", transformer=path, num_heads=4)
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 2
    loaded = PTDiTTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer").state_dict()
    assert all(torch.equal(value, original[name]) for name, value in loaded.items())

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match="model-00002-of-00002.safetensors, which is missing"):
        networks.plan_transformer(path, 4, None, None)


def test_the_released_shapes_are_those_of_the_released_configuration():
    shapes = json.loads((GOLDEN / "official_transformer_shapes.json").read_text())
    found = configuration.infer_transformer({name: tuple(shape) for name, shape in shapes.items()})
    assert (found["attention_head_dim"], found["num_layers"], found["caption_channels"]) == (1152, 28, 4096)
    assert (found["in_channels"], found["out_channels"], found["shift_window"]) == (4, 8, True)
    assert (found["sample_size"], found["sample_frames"], found["use_additional_conditions"]) == (32, 1, False)
    shapes = json.loads((GOLDEN / "official_vae_shapes.json").read_text())
    found = configuration.infer_vae({name: tuple(shape) for name, shape in shapes.items()})
    defaults = dict(networks.build(AutoencoderKLOpenSoraPlan, {}).config)
    assert all(defaults[name] == value for name, value in found.items())


def test_a_whole_t5_gives_its_encoder_and_every_layout_its_own_configuration(tmp_path):
    for gated in (True, False):
        t5 = small_t5(gated=gated)
        state = {f"text_encoders.t5xxl.transformer.{name}": value.clone() for name, value in t5.state_dict().items()}
        state["text_encoders.t5xxl.transformer.decoder.final_layer_norm.weight"] = torch.ones(32)
        state["text_encoders.t5xxl.transformer.lm_head.weight"] = torch.ones(40, 32)
        save_file(state, tmp_path / "t5.safetensors")
        config = text.plan_text_encoder(tmp_path / "t5.safetensors").model.config
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"):
            assert getattr(config, name) == getattr(t5.config, name)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["blocks.0.cross_attn.q_linear.weight", "y_embedder.y_embedding"], "PixArt"),
        (["transformer_blocks.0.attn2.to_q.weight", "adaln_single.linear.weight", "norm.weight"], "PixArt"),
        (["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"], "CogVideoX"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["transformer_blocks.0.attn1.to_q.lora_A.weight"], "LoRA"),
        (["something.weight"], "unknown kind"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_and_recognised(capsys, tmp_path, names, kind):
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    errors = refusal(capsys, tmp_path, "--transformer", tmp_path / "other.safetensors")
    assert kind in errors
    assert " missing: " in errors and " more; " in errors  # only the first ten are named
    errors = refusal(capsys, tmp_path, "--vae", tmp_path / "other.safetensors")
    assert kind in errors and "Open-Sora-Plan" in errors
    errors = refusal(capsys, tmp_path, "--text-encoder", tmp_path / "other.safetensors")
    assert kind in errors and "T5" in errors


def test_files_given_for_the_wrong_component_are_recognised(capsys, tmp_path, inputs):
    assert "seems to be the VAE of Open-Sora-Plan" in refusal(capsys, tmp_path, "--transformer", inputs["vae"])
    assert "seems to be a PT-DiT transformer" in refusal(capsys, tmp_path, "--vae", inputs["transformer"])
    assert "seems to be a T5" in refusal(capsys, tmp_path, "--transformer", inputs["t5_file"])
    assert kind_of(["x.weight"]) is None


def test_missing_unexpected_and_misshapen_weights_are_named(capsys, tmp_path):
    state = golden_weights()
    del state["transformer_blocks.1.attn2.to_q.bias"]
    state["proj_out.bias"] = torch.zeros(7)
    state["surprise.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "a.safetensors")
    errors = refusal(capsys, tmp_path, "--transformer", tmp_path / "a.safetensors", *SMALL)
    assert "1 missing: transformer_blocks.1.attn2.to_q.bias" in errors
    assert "1 unexpected: surprise.weight" in errors
    assert "1 misshapen: proj_out.bias is (7,), must be (32,)" in errors


def test_a_position_buffer_of_a_wrong_shape_is_refused(capsys, tmp_path):
    save_file(golden_weights() | {"pos_embed.pos_embed": torch.zeros(1, 1, 250, 48)}, tmp_path / "a.safetensors")
    errors = refusal(capsys, tmp_path, "--transformer", tmp_path / "a.safetensors", *SMALL)
    assert "1 misshapen: pos_embed.pos_embed" in errors


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
@pytest.mark.parametrize("share", [0.5, 0.0002, 0])
def test_half_a_file_and_an_empty_one_are_reported_as_that(capsys, tmp_path, name, share):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(golden_weights(), path, _use_new_zipfile_serialization=name == "a.pt")
    else:
        save_file(golden_weights(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    errors = refusal(capsys, tmp_path, "--transformer", path, *SMALL)
    assert ("is empty" if share == 0 else "cut off") in errors and "fetch it again" in errors


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + bytes(64), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"plain words, no weights", "neither a torch file"),
    ],
)
def test_files_that_are_no_checkpoints_are_reported_as_what_they_are(capsys, tmp_path, content, words):
    (tmp_path / "a.pt").write_bytes(content)
    assert words in refusal(capsys, tmp_path, "--transformer", tmp_path / "a.pt")


def test_a_folder_or_nothing_in_place_of_a_file_is_refused(capsys, tmp_path, inputs):
    errors = refusal(capsys, tmp_path, "--transformer", inputs["transformer"].parent)
    assert "is a folder; name a checkpoint file, for example" in errors
    assert "there is no file" in refusal(capsys, tmp_path, "--vae", tmp_path / "none.ckpt")
    assert "no config.json" in refusal(capsys, tmp_path, "--text-encoder", tmp_path)
    assert "at least one of" in refusal(capsys, tmp_path)


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "zip with protocol 4", "old", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(capsys, tmp_path, how):
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    content = {"model": golden_weights(), "extra": Evil(trap)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(trap)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "old", pickle_protocol=4 if "4" in how else 2)
    errors = refusal(capsys, tmp_path, "--transformer", path, *SMALL)
    assert "wants to run code" in errors and "mkdir" in errors
    assert not trap.exists()


def test_an_fp8_file_becomes_bf16_and_a_quantized_one_is_refused(capsys, tmp_path):
    state = {name: value.to(torch.float8_e4m3fn) for name, value in golden_weights().items()}
    save_file(state, tmp_path / "fp8.safetensors")
    output = tmp_path / "out"
    words = ["--transformer", str(tmp_path / "fp8.safetensors"), "--output", str(output), *SMALL]
    assert main(["convert", *words]) == 0
    assert "in float8_e4m3fn" in (said := capsys.readouterr().out) and "will be bfloat16" in said
    written = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in written.items())

    state = golden_weights() | {"proj_out.weight": torch.zeros(32, 48, dtype=torch.int8)}
    save_file(state, tmp_path / "int8.safetensors")
    assert "int8 numbers" in refusal(capsys, tmp_path, "--transformer", tmp_path / "int8.safetensors", *SMALL)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "damaged"), (1e6, "too large for fp16")])
def test_numbers_that_are_not_finite_or_do_not_fit_are_refused(capsys, tmp_path, value, words):
    state = golden_weights()
    state["proj_out.bias"][3] = value
    save_file(state, tmp_path / "a.safetensors")
    errors = refusal(capsys, tmp_path, "--transformer", tmp_path / "a.safetensors", "--dtype", "fp16", *SMALL)
    assert words in errors and "proj_out.bias" in errors


def test_a_t5_of_another_width_is_refused(capsys, tmp_path, inputs):
    small_t5(width=64).save_pretrained(tmp_path / "t5")
    words = ("--transformer", inputs["transformer"], "--text-encoder", tmp_path / "t5", *SMALL)
    errors = refusal(capsys, tmp_path, *words)
    assert "is a T5 of width 64, but the transformer reads text of width 32" in errors


def test_another_text_encoder_and_a_missing_tokenizer_are_refused(capsys, tmp_path, inputs):
    shutil.copytree(inputs["t5_folder"] / "text_encoder", tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "umt5"}))
    assert "holds a umt5 model" in refusal(capsys, tmp_path, "--text-encoder", tmp_path / "other")
    words = ("--text-encoder", inputs["t5_folder"], "--tokenizer", tmp_path / "other")
    assert "is not a folder with a tokenizer" in refusal(capsys, tmp_path, *words)


def test_heads_that_cannot_be_known_or_do_not_divide_are_refused(capsys, tmp_path, inputs):
    errors = refusal(capsys, tmp_path, "--transformer", inputs["transformer"])
    assert "width 48 is no known size" in errors and "1152 (16 heads)" in errors and "--num-heads" in errors
    errors = refusal(capsys, tmp_path, "--transformer", inputs["transformer"], "--num-heads", "5")
    assert "does not divide the width 48; nearest: 4" in errors


def test_an_existing_output_is_refused_without_overwrite(capsys, tmp_path, inputs):
    output = tmp_path / "place" / "model"
    output.mkdir(parents=True)
    assert "exists; name another folder, or add --overwrite" in refusal(capsys, tmp_path, "--vae", inputs["vae"])
    (output / "thesis.txt").write_text("years of work")
    assert "something else than a model" in refusal(capsys, tmp_path, "--vae", inputs["vae"], "--overwrite")
    (output / "model_index.json").write_text("{}")
    assert "holds thesis.txt" in refusal(capsys, tmp_path, "--vae", inputs["vae"], "--overwrite")
    (output / "thesis.txt").unlink()
    assert main(["convert", "--vae", str(inputs["vae"]), "--output", str(output), "--overwrite"]) == 0
    assert sorted(os.listdir(output)) == ["model_index.json", "scheduler", "vae"]
    assert os.listdir(output.parent) == ["model"]
    weights = output / "vae" / "diffusion_pytorch_model.safetensors"
    assert "would be replaced" in refusal(capsys, tmp_path, "--vae", weights, "--overwrite")


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up_leaves_nothing_new_and_the_old_model_alone(
    capsys, tmp_path, inputs, monkeypatch, existing
):
    output = tmp_path / "place" / "model"
    output.parent.mkdir()
    if existing:
        assert main(["convert", "--vae", str(inputs["vae"]), "--output", str(output)]) == 0
    seen = []

    def full(file: int) -> None:
        seen.append(sorted(path.name for path in output.parent.glob(".model-*.part/**/*")))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    words = ("--transformer", inputs["transformer"], "--overwrite", *SMALL)
    assert "No space left on device" in refusal(capsys, tmp_path, *words)
    assert "model_index.json" not in seen[0] and "diffusion_pytorch_model.safetensors" in seen[0]
    if existing:
        assert AutoencoderKLOpenSoraPlan.from_pretrained(output, subfolder="vae").config.hidden_size == 32


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(capsys, tmp_path, inputs, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    assert "GB are needed" in refusal(capsys, tmp_path, "--vae", inputs["vae"])


def test_an_interrupt_leaves_nothing_behind(capsys, tmp_path, inputs, monkeypatch):
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["convert", "--vae", str(inputs["vae"]), "--output", str(tmp_path / "model")])
    assert end.value.code == 130
    assert os.listdir(tmp_path) == []
    assert "nothing was written" in capsys.readouterr().err
