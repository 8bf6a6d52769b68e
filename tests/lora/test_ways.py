"""Every way of training runs, goes on bit for bit after a stop, and gives a file that loads; what needs a package is
skipped without it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora.command_line import PACKAGES, check_packages
from lora.config import LoRASettings
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.checkpoint import load_checkpoint

FILE = "lora/pytorch_lora_weights.safetensors"
WAYS = {
    "gaussian": ["--init", "gaussian"],
    "pissa": ["--init", "pissa"],
    "olora": ["--init", "olora", "--alpha", "4"],
    "rslora": ["--rslora", "--alpha", "3"],
    "dora": ["--dora", "--ema", "0.9"],
    "bf16": ["--precision", "bf16", "--targets", "all-linear"],
    "fp8": ["--base-weights", "fp8"],
    "int8": ["--base-weights", "int8", "--dora"],
    "nf4": ["--base-weights", "nf4", "--dora", "--gradient-checkpointing"],
    "adamw8bit": ["--optimizer", "adamw8bit", "--rank", "64"],
    "lion": ["--optimizer", "lion", "--optimizer-args", "betas=[0.9,0.95]"],
    "adafactor": ["--optimizer", "torch.optim.Adafactor", "--lr-pattern", "lora_B=4"],
    "prodigy": ["--optimizer", "prodigy", "--lr", "1"],
    "schedule-free": ["--optimizer", "schedule_free_adamw"],
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way == "dora" else pytest.mark.slow) for way in WAYS])
def test_a_way_of_training_resumes_and_its_file_loads(train, tmp_path, tiny_model_folder, way):
    flags = WAYS[way]
    for (name, value), package in PACKAGES.items():
        if f"--{name.replace('_', '-')}" in flags and value in flags:
            pytest.importorskip(package)
    steps = ["--max-steps", "2", "--checkpoint-every", "0"]
    assert train("straight", *flags, *steps) == 0
    assert train("resumed", *flags, *steps, "--stop-after", "1") == 0
    assert train("resumed", *flags, *steps, "--resume") == 0
    one, two = load_file(tmp_path / "straight" / FILE), load_file(tmp_path / "resumed" / FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    moved = max(value.abs().max() for key, value in one.items() if "lora_B" in key)
    assert 0 < moved < 10
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, text_encoder=None, tokenizer=None)
    pipe.load_lora_weights(tmp_path / "straight" / "lora", adapter_name="mine")
    assert pipe.get_list_adapters() == {"transformer": ["mine"]}
    with safe_open(tmp_path / "straight" / FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.use_dora"] == ("--dora" in flags)
    assert config["transformer.r"] == config["transformer.lora_alpha"]


def test_a_lora_of_every_n_steps_loads_in_both_forms(train, tmp_path, tiny_model_folder):
    assert train("out", "--export-every", "2", "--ema", "0.9") == 0
    assert train("short", "--max-steps", "2", "--ema", "0.9") == 0
    folder = tmp_path / "out" / "exports" / "step-00000002"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # step 4 is the last, which lies in lora/
    assert load_file(folder / "pytorch_lora_weights.safetensors").keys() == load_file(tmp_path / "out" / FILE).keys()
    early, end = load_file(folder / "pytorch_lora_weights.safetensors"), load_file(tmp_path / "short" / FILE)
    assert all(torch.equal(early[key], end[key]) for key in early)  # what a run of so many steps gives
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, text_encoder=None, tokenizer=None)
    pipe.load_lora_weights(folder, adapter_name="one")
    pipe.load_lora_weights(load_file(folder / "comfyui" / "out-00000002.safetensors"), adapter_name="two")
    assert "2 steps, rank 2" in (folder / "README.md").read_text()


def test_epochs_count_passes_and_old_checkpoints_go(train, tmp_path):
    assert train("out", "--epochs", "2", "--checkpoint-every", "1", "--keep", "2") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]  # 3 + 2 pictures in two buckets, two a batch
    found = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert found == ["checkpoint-00000005", "checkpoint-00000006"]


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(train, tmp_path, monkeypatch):
    flags = ["--max-steps", "2", "--targets", "attention+ff"]
    assert train("plain", *flags) == 0
    torch._dynamo.reset()
    made = []
    compile_blocks = torch.nn.Module.compile

    def counting(module, *args, **kwargs):
        made.append(module)
        return compile_blocks(module, *args, backend="aot_eager", **kwargs)  # the graphs of inductor, without its C++

    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    assert train("compiled", *flags, "--compile") == 0
    torch._dynamo.reset()
    assert len(made) == 2  # blocks
    one, two = (load_file(tmp_path / name / FILE) for name in ("plain", "compiled"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)


def test_the_log_and_the_pictures_go_to_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = ["--validation-prompts", "a red star", "--validation-steps", "1", "--max-steps", "2"]
    assert train("out", "--report-to", "tensorboard", *shown) == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss", "lr", "gradient_norm", "samples_per_second", "data_wait", "memory_gib", "seconds"
    }  # fmt: skip
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("validation/0")] == [0, 1, 2]


def test_the_log_and_the_pictures_go_to_wandb(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shown = ["--validation-prompts", "a red star", "--validation-steps", "1", "--max-steps", "2"]
    assert train("out", "--report-to", "wandb", *shown) == 0
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb")) and list(run.rglob("validation_*.png"))


@pytest.mark.parametrize("setting, package", PACKAGES.items(), ids=str)
def test_a_missing_package_is_named(monkeypatch, setting, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    name, value = setting
    with pytest.raises(ValueError, match=f"{name}={value!r} needs {package}: pip install {package}; or use '.*'"):
        check_packages(LoRASettings(output_dir="x", lr=1.0, **{name: value}))


def test_validation_pictures_say_how_they_were_made(train, tmp_path):
    from PIL import Image

    assert train("out", "--max-steps", "1", "--validation-prompts", "a red star", "--validation-steps", "1") == 0
    with Image.open(tmp_path / "out" / "validation" / "step-00000001-0.png") as picture:
        assert {key: picture.text[key] for key in ("prompt", "seed", "step")} == {
            "prompt": "a red star", "seed": "0", "step": "1"
        }  # fmt: skip
    card = (tmp_path / "out" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "a red star" in card and "rank 2 on 40 layers" in card and "sheet.png" in card


@pytest.mark.slow
def test_pictures_of_the_base_model_are_generated_once_and_trained_on(train, pictures, tmp_path):
    prompts = tmp_path / "prior.txt"
    prompts.write_text("a red star\na blue ring\n", encoding="utf-8")
    cache = tmp_path / "cache"
    words = ["--data", pictures, "--cache-dir", cache, "--prior-prompts", prompts, "--max-steps", "2"]
    assert train("one", *words, "--prior-weight", "0") == 0
    made = {path.name: path.stat().st_mtime_ns for path in (cache / "prior").iterdir()}
    assert sorted(name[:5] for name in made) == ["0000-", "0001-"]
    assert train("two", *words, "--prior-weight", "5") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (cache / "prior").iterdir()} == made
    samples = json.loads((tmp_path / "two" / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert [sample["prior"] for sample in samples] == [False] * 5 + [True] * 2
    one, two = ((tmp_path / name / "log.jsonl").read_text() for name in ("one", "two"))
    assert one != two


def test_short_videos_are_trained_on_beside_pictures(train, pictures, tmp_path):
    from PIL import Image, ImageDraw

    data = tmp_path / "data"
    data.mkdir()
    os.link(pictures / "0.png", data / "still.png")
    for index in range(2):
        frames = [Image.new("RGB", (64, 64), "white") for _ in range(6)]
        for place, frame in enumerate(frames):
            ImageDraw.Draw(frame).rectangle((place * 8, 20, place * 8 + 16, 40), fill=("red", "blue")[index])
        frames[0].save(data / f"{index}.gif", save_all=True, append_images=frames[1:])
        (data / f"{index}.txt").write_text("a red square", encoding="utf-8")
    words = ["--data", data, "--cache-dir", tmp_path / "cache", "--num-frames", "5", "--epochs", "1"]
    assert train("out", *words) == 0
    samples = json.loads((tmp_path / "out" / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert sorted(tuple(sample["bucket"]) for sample in samples) == [(1, 64, 64), (5, 64, 64), (5, 64, 64)]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2


def test_an_mp4_is_read(tmp_path):
    av = pytest.importorskip("av")
    from PIL import Image

    from ptdit_diffusers.training.data.media import read_frames

    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for gray in range(0, 250, 50):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (gray, gray, gray)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read_frames(Path(tmp_path / "clip.mp4"), 5)
    found = [frame.getpixel((32, 32))[0] for frame in frames]
    assert all(abs(value - gray) < 8 for value, gray in zip(found, range(0, 250, 50), strict=True))


def test_a_schedule_free_optimizer_gives_its_average_and_looking_at_it_changes_nothing(train, tmp_path):
    pytest.importorskip("schedulefree")
    flags = ["--optimizer", "schedule_free_adamw"]
    assert train("plain", *flags) == 0
    assert train("looked", *flags, "--export-every", "1") == 0
    plain, looked = (load_file(tmp_path / name / FILE) for name in ("plain", "looked"))
    assert all(torch.equal(plain[key], looked[key]) for key in plain)
    state = load_checkpoint(tmp_path / "plain")
    (optimizer,) = state["optimizers"]
    for index, (name, trained) in enumerate(state["model"].items()):
        beta, base = optimizer["param_groups"][0]["betas"][0], optimizer["state"][index]["z"]
        average = base + (trained - base) / beta  # trained = (1 - beta) base + beta average, in the paper's equation 3
        saved = plain["transformer." + name.replace(".default", "")]
        torch.testing.assert_close(saved, average, atol=1e-6, rtol=1e-5)
        assert not trained.any() or not torch.equal(saved, trained)
