"""`ptdit train` through its own main function: what comes out, resume, what is refused, what a bad shard does."""

import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ptdit_diffusers.core.cost import Size, total_macs
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.own_data import average, encode, train
from ptdit_diffusers.training.own_data.batches import OwnBatches, stage_data
from ptdit_diffusers.training.own_data.card import card, data_notes, noted_version
from ptdit_diffusers.training.own_data.model import make_base, outline
from ptdit_diffusers.training.own_data.settings import read_settings
from ptdit_diffusers.training.own_data.task import sample_flops
from ptdit_diffusers.training.run import Run

STAGE = {"resolution": 64, "steps": 12, "batch": 6, "lr": 1e-3}
KEPT = {"scale_shift_table", "proxy_scale_shift_table"}  # in float32, whatever the other weights are
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def reset() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def run(config: Path, *overrides: str) -> int:
    reset()
    return train.main(["--config", str(config), *(word for item in overrides for word in ("--set", item))])


def some_of(drawn: Path, folder: Path) -> Path:
    """Copy four drawn pictures with their captions."""
    folder.mkdir()
    for path in sorted(drawn.iterdir())[:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_run_ends_in_a_model_folder_a_sheet_and_a_log_with_held_out_losses(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(config(run={"export_every": 5})) == 0
    out = tmp_path / "out"
    pipe = PTDiTPipeline.from_pretrained(out / "model")
    picture = pipe("a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (64, 64)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in shown] == [0, 12] and {"seen_loss"} <= shown[0].keys()
    assert {"loss_quarter_1", "loss_quarter_4", "data_wait", "memory_gib"} <= lines[1].keys()
    assert lines[1]["tokens_per_second"] == pytest.approx(16 * lines[1]["samples_per_second"], rel=1e-4)
    assert "mfu" not in lines[1] and "no mfu in the log: the peak of this device is not known" in caplog.text
    assert (out / "sheet.png").is_file() and (out / "sheets" / "step-00000012-0.png").is_file()
    assert "held-out loss of the start on these data" in caplog.text
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert "12 steps of 6 at 64 pixels" in card and "40 pictures or clips. Licences: not given." in card
    assert "36 samples" in caplog.text and "4 held out" in caplog.text and "few for all weights" in caplog.text
    ways = [out / "exports" / name for name in ("step-00000005", "step-00000010")]
    assert sorted((out / "exports").iterdir()) == ways and PTDiTPipeline.from_pretrained(ways[1])
    assert str(tmp_path) not in card and "after step 5" in (ways[0] / "README.md").read_text(encoding="utf-8")
    one, two, last = (load_file(folder / WEIGHTS) for folder in (*ways, out / "model"))
    assert any(not torch.equal(one[name], two[name]) and not torch.equal(two[name], last[name]) for name in last)
    assert len({(folder / "vae" / "config.json").stat().st_ino for folder in ways}) == 1  # on the disk once
    start = load_file(Path(read_settings(config()).start) / WEIGHTS)
    assert any(not torch.equal(value, start[name]) for name, value in load_file(out / "model" / WEIGHTS).items())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(config, tmp_path):
    """Its checkpoints were written while the training went on."""
    assert run(config("straight"), "run.sheet=[]") == 0
    assert run(config("stopped"), "run.sheet=[]", "run.stop_after=5", "run.async=true") == 0
    assert not (tmp_path / "stopped" / "model").exists()
    assert run(config("stopped"), "run.sheet=[]") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    one, two = (load_file(tmp_path / name / "model" / WEIGHTS) for name in ("straight", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["attention", "lora"])
def test_only_what_is_asked_for_is_trained_and_a_lora_is_merged_and_beside_the_model(config, tmp_path, kind):
    path = config(train=kind, rank=2)
    assert run(path, "run.sheet=[]", "stages=[{resolution: 64, steps: 3, batch: 6, lr: 0.01}]") == 0
    start = load_file(Path(read_settings(path).start) / WEIGHTS)
    trained = load_file(tmp_path / "out" / "model" / WEIGHTS)
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved and all(".attn" in name for name in moved) and start.keys() == trained.keys()
    if kind == "lora":
        text = "a red star"
        merged = PTDiTPipeline.from_pretrained(tmp_path / "out" / "model")
        loaded = PTDiTPipeline.from_pretrained(read_settings(path).start)
        loaded.load_lora_weights(tmp_path / "out" / "model" / "lora")
        options = {"num_inference_steps": 2, "output_type": "np"}
        pictures = [
            pipe(text, generator=torch.Generator().manual_seed(0), **options).images for pipe in (merged, loaded)
        ]
        np.testing.assert_allclose(*pictures, atol=1e-4)


def test_the_next_stage_goes_on_with_the_loss_and_the_optimizer_of_the_one_before(config, tmp_path):
    stages = (
        "stages=[{resolution: 64, steps: 4, batch: 6, lr: 0.001}, {resolution: 96, steps: 4, batch: 4, lr: 0.001}]"
    )
    assert run(config(), stages, "run.sheet=[]") == 0
    found = losses(tmp_path / "out")
    assert list(found) == list(range(1, 9))
    assert abs(found[5] - found[4]) < 0.5 * found[4]  # no jump: the same weights at a near size
    weights = json.loads((tmp_path / "out" / "model" / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert weights["window_size"] == [1, 3, 3]  # its own size is that of the last stage
    assert PTDiTPipeline.from_pretrained(tmp_path / "out" / "model")("a ring", num_inference_steps=1).images[
        0
    ].size == (96, 96)
    assert run(config("again"), stages, "run.sheet=[]", "run.stop_after=5") == 0  # stops in the second stage
    assert run(config("again"), stages, "run.sheet=[]") == 0
    assert losses(tmp_path / "again") == found


def test_captions_from_the_disk_give_the_loss_of_captions_that_are_encoded_in_each_step(config, tmp_path):
    for mode in ("online", "cached"):
        assert run(config(mode, text={"mode": mode})) == 0
    online, cached = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert online == pytest.approx(cached, rel=1e-5)


def test_a_stage_has_data_of_its_own_with_several_captions_and_a_quality(config, drawn, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    good, lines = tmp_path / "good", []
    good.mkdir()
    for number in range(8):
        (good / f"{number}.png").write_bytes((drawn / f"{number:04d}.png").read_bytes())
        facts = {"text": ["a red star", "a ring"], "weights": [1, 3], "quality": number}
        lines.append({"file_name": f"{number}.png", **facts})
    (good / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    few = {"resolution": 64, "steps": 2, "batch": 4, "lr": 1e-3}
    stages = [few, few | {"data": str(good), "where": "quality >= 3", "steps": 20}]
    for mode in ("online", "cached"):
        path = config(mode, stages=stages, text={"mode": mode}, data={"validation": 0}, run={"ema": []})
        assert run(path, "run.sheet=[]", "run.stop_after=3") == 0
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cached"), rel=1e-5)
    assert "stage 1: 40 samples" in caplog.text and "stage 2: 5 samples" in caplog.text
    settings = read_settings(path)
    versions = [noted_version(settings, note) for note in data_notes(settings)]
    texts = [SimpleNamespace(rows=lambda captions, numbers: {"captions": captions})] * 2
    batches = OwnBatches(settings, make_base(settings), stage_data(settings, versions), texts, 0, 1)
    seen = Counter(caption for step in range(2, 22) for caption in batches[step]["captions"])
    assert seen.keys() == {"a red star", "a ring", ""} and 0.65 < seen["a ring"] / (seen.total() - seen[""]) < 0.85


def test_captions_that_are_cut_at_another_length_are_read_from_another_place_and_counted(
    config, drawn, tmp_path, caplog
):
    data = {"source": str(some_of(drawn, tmp_path / "few")), "validation": 0, "flip": False}
    for tokens in (200, 3):
        path = config(f"tokens-{tokens}", data=data, text={"mode": "cached", "tokens": tokens})
        assert run(path, "run.sheet=[]", "run.ema=[]", "run.stop_after=1") == 0
    assert losses(tmp_path / "tokens-3") != losses(tmp_path / "tokens-200")
    names = sorted(folder.name for folder in (tmp_path / "encoded").rglob("text-*"))
    assert len(names) == 2 and names[1] == f"{names[0]}-3"
    assert "captions are longer than 3 tokens and are cut" in caplog.text and "than 200" not in caplog.text


def test_the_pictures_of_the_vae_are_looked_at_before_long_work(config, drawn, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    path = config(vae={"train": "decoder", "source": str(tmp_path / "pictures")})
    assert run(path) == 2
    error = capsys.readouterr().err
    assert f"vae.source={str(tmp_path / 'pictures')!r}" in error and "a.png" in error
    assert run(config(vae={"train": "decoder", "source": str(drawn)}), "data.licence_column=licence") == 2
    assert not (tmp_path / "out").exists()


def test_the_limits_of_a_call_hold_for_the_vae_and_the_transformer_together(config, drawn, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = {"source": str(some_of(drawn, tmp_path / "few")), "validation": 0, "flip": False}
    vae = {"train": "decoder", "steps": 2, "batch": 1, "crop": 16}
    path = config(vae=vae, run={"sheet": [], "ema": []}, data=data)
    assert run(path, "run.max_minutes=1e-9") == 0 and "stopped at step 0 of 2" in caplog.text
    assert run(path, "run.stop_after=1") == 0 and "stopped at step 1 of 2" in caplog.text
    assert not (tmp_path / "out" / "data.json").exists()
    assert run(path, "run.stop_after=2", "run.max_minutes=60") == 0 and "stopped at step 1 of 12" in caplog.text


def test_a_licence_that_is_missing_where_one_is_needed_is_refused_before_anything_is_written(config, tmp_path, capsys):
    assert run(config(), "data.licence_column=licence") == 2
    error = capsys.readouterr().err
    assert "40 of 40 files have no 'licence' (data.licence_column), for example 0000.png, " in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_card_counts_the_licences_of_the_pictures(config, drawn, tmp_path):
    data, lines = tmp_path / "data", []
    data.mkdir()
    for number, licence in enumerate(["CC0", "CC BY 4.0", "CC0"]):
        (data / f"{number}.png").write_bytes((drawn / f"{number:04d}.png").read_bytes())
        lines.append({"file_name": f"{number}.png", "text": "a ring", "licence": licence})
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = config(data={"source": str(data), "licence_column": "licence"})
    assert encode.main(["--config", str(path)]) == 0
    (index,) = (tmp_path / "encoded").rglob("manifest.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.json").write_text(json.dumps({"version": str(index.parent)}), encoding="utf-8")
    text = card(read_settings(path), "cats", 12, "as they are")
    assert "- 3 pictures or clips. Licences: CC0 (2), CC BY 4.0 (1)." in text and str(tmp_path) not in text
    assert "(`train: all`), the VAE of `" in text and "the text encoder of `" in text
    more = {"start": "new", "base": "shapes-128", "vae": {"train": "new"}, "text": {"grow": True, "train": True}}
    assert (
        "from new weights, a new VAE, and the text encoder of `shapes-128`, with more words and trained with the "
        "transformer: 12 steps of 6"
    ) in card(read_settings(config(**more)), "cats", 12, "as they are")
    index.unlink()
    assert "Data that are not here any more" in card(read_settings(path), "cats", 12, "as they are")


def test_a_column_of_groups_that_no_file_has_is_said(config, caplog):
    assert encode.main(["--config", str(config()), "--set", "data.group_column=object"]) == 0
    assert "no file has a 'object' (data.group_column), so none are held out together" in caplog.text


def test_a_shard_that_vanishes_is_named_counted_and_replaced_and_the_run_goes_on(config, tmp_path, caplog):
    path = config(data={"validation": 0}, stages=[STAGE | {"buckets": 4.0}])
    assert run(path, "run.sheet=[]", "run.stop_after=2") == 0
    (wide, *_) = (tmp_path / "encoded").rglob("1x32x128/*.safetensors")
    wide.unlink()
    assert run(path, "run.sheet=[]") == 0
    facts = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert [each["samples"] for each in facts["bad_shards"]] == [10] and wide.stem in facts["bad_shards"][0]["shard"]
    assert wide.name in caplog.text and "its 10 samples are replaced" in caplog.text
    assert max(losses(tmp_path / "out")) == 12


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_and_is_never_saved(config, tmp_path, capsys, monkeypatch):
    optimize = Run.optimize

    def breaks(self, batches):
        if self.step == 6:
            self.trained[-1].data[0] = torch.nan
        optimize(self, batches)

    monkeypatch.setattr(Run, "optimize", breaks)
    assert run(config(), "run.sheet=[]") == 1
    message = capsys.readouterr().err
    assert "the loss is nan at step 7 (" in message and ".png" in message
    assert "the last sound checkpoint is checkpoint-00000004" in message
    assert [each.name for each in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000004"]


def test_the_share_of_the_peak_follows_from_operations_and_time(config, tmp_path):
    """The operations against the formulas of `core/cost.py`: a multiply-add is two, and the backward twice more."""
    path = config(run={"peak_tflops": 0.002}, stages=[STAGE | {"buckets": 1.0}])
    assert run(path, "run.sheet=[]", "run.ema=[]", "data.validation=0", "run.stop_after=2") == 0
    settings = read_settings(path)
    model = outline(settings, make_base(settings))
    flops = sample_flops(model, (4, 1, 8, 8), 5)
    heads = model.config.num_attention_heads * model.config.attention_head_dim
    size = Size((1, 4, 4), (1, 2, 2), (1, 2, 2), heads, model.config.num_layers, text=5, caption=32)
    assert flops == pytest.approx(6 * total_macs(size), rel=0.15)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line["mfu"] == pytest.approx(flops * line["samples_per_second"] / 2e9, rel=0.2)  # longer captions


def test_processes_that_read_ahead_change_nothing(config, tmp_path):
    for workers in (0, 1):
        overrides = [f"run.workers={workers}", "run.sheet=[]", "run.ema=[]", "data.validation=0"]
        overrides += ["data.shuffle_caption=true", "data.caption_separator=a"]
        assert run(config(f"workers-{workers}"), *overrides, "run.stop_after=4") == 0
    assert losses(tmp_path / "workers-0") == losses(tmp_path / "workers-1")


@pytest.mark.parametrize(
    "setting, value, package, other",
    [
        *(("run.report_to", name, name, "none") for name in ("tensorboard", "wandb", "trackio")),
        ("optimizer.name", "adamw8bit", "torchao", "adamw"),
        ("optimizer.weights", "bf16-stochastic", "torchao", "fp32"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    config, tmp_path, capsys, monkeypatch, setting, value, package, other
):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == package else name)
    assert run(config(), f"{setting}={value}", "run.precision=bf16") == 2
    assert f"{setting}={value!r} needs {package}: pip install {package}; or use {other!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_the_log_and_the_sheet_go_to_a_tracker(config, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read while it is imported
    pytest.importorskip(kind, reason=f"{kind} is optional")
    shown = {"report_to": kind, "ema": [], "stop_after": 2}
    assert run(config(run=shown), "data.validation=0", "run.log_every=1") == 0
    place = {"tensorboard": "out/tensorboard", "wandb": "out/wandb", "trackio": "trackio"}[kind]
    names = [path.name for path in (tmp_path / place).rglob("*") if path.is_file()]
    wanted = {"tensorboard": "events.", "wandb": ".wandb", "trackio": ".db"}[kind]
    assert any(wanted in name for name in names), names
    assert kind == "tensorboard" or any(name.endswith(".png") for name in names)  # which has them in its events


@torch.compiler.set_stance("force_eager")  # compiling takes many seconds
def test_small_memory_weights_and_optimizer_go_on_bit_for_bit(config, tmp_path):
    """bf16 weights that are rounded at random, 8-bit averages of Adam; the running average of weights is float32."""
    pytest.importorskip("torchao", reason="torchao is optional")
    small = {
        "optimizer": {"name": "adamw8bit", "weights": "bf16-stochastic"},
        "stages": [STAGE | {"steps": 4, "batch": 2}],
    }
    small["run"] = {"precision": "bf16"}
    assert run(config("straight", **small)) == 0
    assert run(config("stopped", **small), "run.stop_after=2", "run.async=true") == 0
    assert run(config("stopped", **small)) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    one, two = (load_file(tmp_path / name / "model" / WEIGHTS) for name in ("straight", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {name.split(".")[-1] for name, value in one.items() if value.dtype == torch.float32} == KEPT
    assert all(value.dtype == torch.bfloat16 for name, value in one.items() if name.split(".")[-1] not in KEPT)
    state = torch.load(tmp_path / "straight" / "checkpoint-00000004" / "state.pt", weights_only=True)
    assert {value.dtype for value in state["ema"]} == {torch.float32}
    start = load_file(Path(read_settings(config()).start) / WEIGHTS)
    assert sum(not torch.equal(start[name].bfloat16(), value) for name, value in one.items()) > len(one) / 2


def test_bad_settings_are_refused_in_one_line_before_anything_is_written(config, tmp_path, capsys):
    for override, message in {
        "run.sead=1": "run.sead is not a setting; nearest: seed",
        "run.asinc=true": "run.asinc is not a setting; nearest: async.",
        "stages=[{resolution: 60, steps: 1, batch: 1, lr: 1}]": "resolution=60 is not a multiple of 32",
        "data.source=/nowhere": "is neither a folder nor a file",
        "start=nothing": "'nothing' is neither a folder nor a model",
        "train=everything": "train='everything' must be one of all, attention, lora",
        "run.ema=[0.5]": "run.ema=0.5 must be above 0 and below 0.28",
        "data={source: x, shuffle_caption: true}\ntext={mode: cached}": "nearest: text.mode='online'",
        "optimizer={weights: bf16-stochastic, muon: attn}": "muon does not round at random; nearest: weights: fp32",
        "optimizer={weights: bf16-stochastic}": "trains bf16 weights; nearest: run.precision: bf16",
        "stages=[{resolution: 64, steps: 1, batch: 1, lr: 1, wher: x}]": "wher is not a setting; nearest: where",
        "times={mode_scale: 1}": "mode_scale=1 is for timestep_sampling='mode', not 'logit_normal'; nearest: 1.29",
        "times={timestep_sampling: cosine}": "must be one of logit_normal, uniform, mode",
        "vae={train: new}": "gives other latents than those that the transformer knows",
        "vae={source: x}": "vae.source='x' is for vae.train='decoder' or 'new', not 'no'",
        "vae={train: decoder, source: /nowhere}": "vae.source='/nowhere': ",
    }.items():
        assert run(config(), *override.split("\n")) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_folder_that_changed_is_said_and_the_run_keeps_its_data(config, drawn, tmp_path, caplog):
    import shutil

    shutil.copytree(drawn, tmp_path / "copy")
    path = config(data={"source": str(tmp_path / "copy")})
    assert run(path, "run.sheet=[]", "run.stop_after=4") == 0
    (tmp_path / "copy" / "0000.png").unlink()
    assert run(path, "run.sheet=[]", "run.stop_after=1") == 0
    assert "the data changed since this run began (0 new files, 1 missing ones)" in caplog.text


def test_new_weights_are_trained_from_nothing_with_the_parts_of_another_model(config, tiny_model_folder, tmp_path):
    path = config(start="new", base=str(tiny_model_folder))
    size = "size={layers: 1, heads: 1, head_width: 32, num_windows: 4, base_tokens: 16}"
    assert run(path, size, "stages=[{resolution: 64, steps: 2, batch: 4, lr: 0.001}]", "run.sheet=[]") == 0
    pipe = PTDiTPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.transformer.config.num_layers == 1 and not pipe.transformer.config.use_additional_conditions
    assert pipe("a red star", num_inference_steps=1).images[0].size == (64, 64)


def test_clips_views_and_pictures_are_trained_on_together(config, drawn, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "mixed"
    data.mkdir()
    frames = [Image.open(drawn / f"{number:04d}.png") for number in range(5)]
    for number in range(4):
        frames[number].save(data / f"{number}.png")
        frames[number].save(data / f"clip{number}.gif", save_all=True, append_images=frames)
        (data / f"object{number}.views").mkdir()
        for view in (0, 1, 2, 4):  # 3 is wide
            frames[view].save(data / f"object{number}.views" / f"{view}.png")
    stages = [STAGE | {"steps": 4, "batch": 2}]
    path = config(data={"source": str(data), "num_frames": 5, "num_views": 4, "validation": 0}, stages=stages)
    assert run(path, "run.sheet_kind=views", "data.random_crop=true", "data.alpha_mask=true") == 0
    kinds = ("4 of 64x64,", "4 of 64x64 with 5 frames", "4 of 64x64 with 13 frames")
    assert all(kind in caplog.text for kind in kinds)
    sheet = Image.open(tmp_path / "out" / "sheets" / "step-00000004-0.png")
    assert sheet.size == (128, 128)  # four views
    assert len(list((tmp_path / "encoded").rglob("5x64x64/*.safetensors"))) == 1
    pipe = PTDiTPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.transformer.config.sample_frames == 4
    assert len(pipe("a ring", num_frames=5, num_inference_steps=1).frames[0]) == 5


def test_parts_are_encoded_by_several_calls_and_trained_on(config, tmp_path, capsys):
    path = str(config())
    for part in ("1/2", "0/2"):
        assert encode.main(["--config", path, "--part", part]) == 0
    assert encode.main(["--config", path, "--merge"]) == 0
    assert len(list((tmp_path / "encoded").rglob("index-64.npy"))) == 1
    assert run(config(), "run.sheet=[]", "run.stop_after=1") == 0
    assert len(list((tmp_path / "encoded").rglob("index-64.npy"))) == 1  # nothing was encoded again
    assert encode.main(["--config", path, "--part", "2/2"]) == 2
    assert "--part '2/2' is not I/N" in capsys.readouterr().err


def test_an_average_of_another_width_is_a_model_folder(config, tmp_path, capsys):
    assert run(config(), "run.sheet=[]") == 0
    out, made = tmp_path / "out", tmp_path / "wide"
    assert average.main([str(out), "--width", "0.10", "--output", str(made)]) == 0
    assert PTDiTPipeline.from_pretrained(made)("a ring", num_inference_steps=1).images
    narrow = tmp_path / "narrow"
    assert average.main([str(out), "--width", "0.05", "--output", str(narrow)]) == 0
    exported, solved = load_file(out / "model" / WEIGHTS), load_file(narrow / WEIGHTS)  # 0.05 is what was exported
    for name, value in exported.items():
        torch.testing.assert_close(solved[name], value, atol=2e-3, rtol=2e-3)  # snapshots are in half precision
    assert average.main([str(out), "--width", "0.10", "--output", str(made)]) == 2
    assert "exists; give another folder" in capsys.readouterr().err
