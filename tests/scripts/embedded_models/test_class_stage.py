"""The stage of class-conditional models: both objectives train through the real script, resume exactly, and export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ptdit_diffusers import ClassToImagePipeline, DiT2DModel
from ptdit_diffusers.training.checkpoint import load_checkpoint
from ptdit_diffusers.training.settings import load_settings
from scripts import train
from scripts.datasets.shapes import CLASSES
from scripts.embedded_models.class_stage import ClassStage, ClassStageSettings, label_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
SHAPES = ROOT / "ptdit_diffusers" / "weights" / "shapes-128"
PART = {"world": "figures", "samples": 8, "size": 64}


def settings_in(folder: Path, **data) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "export_dir": str(folder / "export"),
        "seed": 1,
        "steps": 3,
        "batch_size": 4,
        "warmup": 1,
        "log_every": 1,
        "sheet_every": 0,
        "model": {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1},
        "data": {
            "components": str(SHAPES),
            "part": {"world": "figures", "samples": 8, "size": 64},
            "steps": 1,
            **data,
        },
    }


def run(folder: Path, *flags: str, **data) -> Path:
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"dit": settings_in(folder, **data)}), encoding="utf-8")
    assert train.main(["--config", str(config), "--stage", "dit", *flags]) == 0
    return folder


@pytest.mark.parametrize(("backbone", "objective"), [("dit", "diffusion"), ("dit", "flow"), ("diffit", "diffusion")])
def test_the_export_is_a_model_that_makes_pictures_of_named_classes(backbone, objective, tmp_path):
    folder = run(tmp_path, "--set", f"model.backbone={backbone}", objective=objective)
    pipe = ClassToImagePipeline.from_pretrained(folder / "export")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.out_channels == (8 if objective == "diffusion" else 4)
    picture = pipe("red star", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert picture.size == (64, 64)
    assert "/" not in json.dumps(json.loads((folder / "export" / "model_index.json").read_text(encoding="utf-8")))
    assert len(list((folder / "run" / "sheets").glob("*.png"))) == 1
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("held_out_loss" in line for line in lines)
    assert all(("loss_vb" in line) == (objective == "diffusion") for line in lines if "loss" in line)


def test_a_run_goes_on_from_weights_in_half_precision(tmp_path):
    start = run(tmp_path / "one") / "export" / "transformer"
    half = DiT2DModel.from_pretrained(start, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dit": settings_in(tmp_path / "two")}), encoding="utf-8")
    settings = load_settings(config, "dit", ClassStageSettings, {"model.start": str(tmp_path / "half")})
    stage = ClassStage(settings, torch.device("cpu"))
    expected = half.state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in stage.model.state_dict().items())


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole = load_checkpoint(run(tmp_path / "whole") / "run")
    run(tmp_path / "parts", "--set", "stop_after=1")
    parts = load_checkpoint(run(tmp_path / "parts") / "run")
    assert parts["step"] == whole["step"] == 3
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


def test_labels_are_those_of_the_pictures_and_training_drops_some(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dit": settings_in(tmp_path)}), encoding="utf-8")
    stage = ClassStage(load_settings(config, "dit", ClassStageSettings, {}), torch.device("cpu"))
    assert [CLASSES[label] for label in stage.labels] == [
        CLASSES[label_of(stage.part.sample(index))] for index in range(8)
    ]
    batch = stage.batch(0, 0, 4)
    assert set(batch["labels"].tolist()) <= set(stage.labels.tolist())
    assert torch.equal(batch["noise"], stage.batch(0, 0, 4)["noise"])
    # the loss depends on the label once the output is not zero, and the null class is drawn in training only
    torch.nn.init.normal_(stage.model.final_layer.linear.weight)
    torch.nn.init.normal_(stage.model.blocks[0].adaLN_modulation[1].weight)
    torch.nn.init.normal_(stage.model.final_layer.adaLN_modulation[1].weight)
    null = dict(batch, labels=torch.full_like(batch["labels"], len(CLASSES)))
    with torch.no_grad():
        stage.model.eval()
        plain, dropped = stage.loss(batch)[0], stage.loss(null)[0]
        stage.model.train()
        stage.model.y_embedder.dropout = 1.0
        assert torch.equal(stage.loss(batch)[0], dropped) and not torch.equal(plain, dropped)


def test_times_are_uniform_or_dense_where_a_figure_gets_its_shape(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dit": settings_in(tmp_path)}), encoding="utf-8")
    shares = {}
    for times in ("uniform", "logit_normal"):
        stage = ClassStage(
            load_settings(config, "dit", ClassStageSettings, {"data.times": times}), torch.device("cpu")
        )
        time = stage.batch(0, 0, 4000)["time"]
        assert time.dtype == torch.int64 and 0 <= time.min() and time.max() <= 999
        shares[times] = float(((time >= 300) & (time < 750)).float().mean())
    assert shares == pytest.approx({"uniform": 0.45, "logit_normal": 0.666}, abs=0.03)
    with pytest.raises(ValueError, match="leave it out"):
        load_settings(config, "dit", ClassStageSettings, {"data.times": "logit_normal", "data.objective": "flow"})


def test_other_data_sets_objectives_and_backbones_are_refused_before_anything_is_made(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    for flag, nearest in (
        ("data.part.world=pictures", "'figures'"),
        ("data.objective=flows", "'flow'"),
        ("model.backbone=dot", "'dit'"),
    ):
        config.write_text(yaml.safe_dump({"dit": settings_in(tmp_path)}), encoding="utf-8")
        with pytest.raises(SystemExit) as refusal:
            train.main(["--config", str(config), "--stage", "dit", "--set", flag])
        assert refusal.value.code == 2 and f"nearest: {nearest}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_published_configurations_are_legal():
    configs = ROOT / "scripts" / "configs"
    dit, diffit = (load_settings(configs / "figures.yaml", name, ClassStageSettings, {}) for name in ("dit", "diffit"))
    own = {name: getattr(diffit, name) for name in ("output_dir", "model", "steps", "batch_size", "lr", "hold")}
    data = replace(dit.data, max_weight=diffit.data.max_weight, times=diffit.data.times)
    assert replace(dit, **own, data=data) == diffit and diffit.model == replace(dit.model, backbone="diffit")
    settings = load_settings(configs / "dit-official.yaml", "dit", ClassStageSettings, {})
    assert (settings.lr, settings.weight_decay, settings.ema_decay, settings.hold) == (1e-4, 0, 0.9999, 1)
