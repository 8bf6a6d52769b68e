"""The text encoder that is trained together with the transformer."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.own_data import average, train
from ptdit_diffusers.training.own_data.settings import read_settings

ENCODER, TRANSFORMER = "text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"


def run(config: Path, *overrides: str) -> int:
    AcceleratorState._reset_state(True)
    words = (word for item in ("run.sheet=[]", *overrides) for word in ("--set", item))
    return train.main(["--config", str(config), *words])


def equal(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_text_encoder_learns_with_the_transformer_and_its_model_is_whole(config, tmp_path):
    """Also after a stop, as the average of another width, and shown on the sheet as it is then."""
    path = config("straight", text={"train": True})
    assert run(path, "run.sheet=[a red star]") == 0
    made = tmp_path / "straight" / "model"
    start = load_file(Path(read_settings(path).start) / ENCODER)
    learned = load_file(made / ENCODER)
    assert learned.keys() == start.keys() and any(not torch.equal(learned[name], start[name]) for name in start)
    stopped = config("stopped", text={"train": True})
    assert run(stopped, "run.stop_after=5") == 0 and run(stopped, "run.sheet=[a red star]") == 0
    assert all(equal(made / part, tmp_path / "stopped" / "model" / part) for part in (ENCODER, TRANSFORMER))
    sheets = [tmp_path / name / "sheets" / "step-00000012-0.png" for name in ("straight", "stopped")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    wide = tmp_path / "wide"
    assert average.main([str(tmp_path / "straight"), "--width", "0.05", "--output", str(wide)]) == 0
    for name, value in load_file(wide / ENCODER).items():
        torch.testing.assert_close(value, learned[name], atol=2e-3, rtol=2e-3)  # snapshots are in half precision
    assert PTDiTPipeline.from_pretrained(wide)("a ring", num_inference_steps=1).images


def test_a_frozen_text_encoder_comes_out_as_it_went_in(config, tmp_path):
    path = config()
    assert run(path, "run.stop_after=0") == 0
    assert equal(Path(read_settings(path).start) / ENCODER, tmp_path / "out" / "model" / ENCODER)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train=lora"], "text.train is for train: all, not 'lora'; nearest: text.train=False"),
        (["text.mode=cached"], "mode='cached' forbids; nearest: 'auto'"),
        (["parallel.shard=2"], "nearest: several processes without them (DDP)"),
    ],
)
def test_where_the_text_encoder_cannot_be_trained_is_said_before_anything_is_written(
    config, tmp_path, capsys, overrides, message
):
    assert run(config(text={"train": True}), *overrides) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_large_text_encoder_stays_as_it_is(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptdit_diffusers.training.own_data.text.SMALL", 10)
    assert run(config(text={"train": True})) == 2
    assert "is too large; nearest: text.train=False" in capsys.readouterr().err
