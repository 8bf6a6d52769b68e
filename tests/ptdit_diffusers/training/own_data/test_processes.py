"""Several processes of `ptdit train`: killed in the middle, gone on with by another number of them."""

import json
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.processes import run, started_ranks, wait

pytestmark = pytest.mark.slow

MODULE = "ptdit_diffusers.training.own_data.train"
VARIABLES = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
SETTINGS = (
    "run.sheet=[]",
    "data.validation=0",
    "run.snapshots=0",
    "run.ema=[0.1]",
    "run.checkpoint_every=3",
    "run.checkpoint_minutes=0",
)


def words(config: Path, *overrides: str) -> list[str]:
    return ["-m", MODULE, "--config", str(config), *(w for item in (*SETTINGS, *overrides) for w in ("--set", item))]


def losses(folder: Path) -> dict[int, float]:
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def train(config: Path, count: int, *overrides: str) -> None:
    with ExitStack() as stack:
        line = words(config, *overrides)
        started = [stack.enter_context(each) for each in started_ranks(line, count, **VARIABLES)]
        for done in wait(started):
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shard", [1, 2], ids=["DDP", "FSDP2"])
def test_a_killed_run_of_two_processes_goes_on_with_one_two_and_three(config, tmp_path, shard):
    """With FSDP2 three processes are one group of three: 3 is no multiple of 2; checkpoints in the background."""
    config = partial(config, parallel={"shard": shard}, run={"async": shard > 1})
    train(config("straight"), 2)
    expected = losses(tmp_path / "straight")
    assert list(expected) == list(range(1, 13))
    killed = config("killed")
    with ExitStack() as stack:
        started = [stack.enter_context(each) for each in started_ranks(words(killed), 2, **VARIABLES)]
        end = time.monotonic() + 120
        log, saved = tmp_path / "killed" / "log.jsonl", tmp_path / "killed" / "checkpoint-00000006"
        while not (saved.exists() and '"step": 7,' in log.read_text(encoding="utf-8")) and time.monotonic() < end:
            assert all(each.returncode is None for each in started), started[0].text("stderr")
            time.sleep(0.01)
        for each in started:
            each.kill()
    assert (tmp_path / "killed" / "checkpoint-00000006" / "state").is_dir() == (shard > 1)
    assert (tmp_path / "killed" / "checkpoint-00000006" / "state.pt").is_file()
    for count in (1, 2, 3):
        folder = tmp_path / f"killed-{count}"
        shutil.copytree(tmp_path / "killed", folder)
        path = config(f"killed-{count}", parallel={"shard": count if shard > 1 else 1})
        if count == 1:
            done = run(words(path), **VARIABLES)
            assert done.returncode == 0, done.stderr
        else:
            train(path, count)
        found = losses(folder)
        assert found == (expected if count == 2 else pytest.approx(expected, abs=1e-5))
        assert (folder / "model" / "model_index.json").is_file()


def test_four_processes_in_two_groups_learn_what_one_process_learns(config, tmp_path):
    """HSDP: the groups have copies of the weights; and with bf16 the weights stay in float32."""
    few = {"stages": [{"resolution": 64, "steps": 3, "batch": 4, "lr": 1e-3}]}
    done = run(words(config("one", **few)), **VARIABLES)
    assert done.returncode == 0, done.stderr
    train(config("four", **few, parallel={"shard": 2}), 4)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    train(config("half", **few, parallel={"shard": 2}, run={"precision": "bf16"}), 2)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "one"), rel=2e-2)
    weights = load_file(tmp_path / "half" / "model/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("shard", [1, 2], ids=["DDP", "FSDP2"])
def test_all_processes_draw_the_sheet_and_measure_the_held_out_loss(config, tmp_path, shard):
    """Three prompts for two processes: one has more to do, and nobody waits for ever."""
    few = {"stages": [{"resolution": 64, "steps": 2, "batch": 4, "lr": 1e-3}], "parallel": {"shard": shard}}
    shown = ["run.sheet=[a red star, a blue ring, a heart]", "data.validation=0.1", "run.snapshots=2"]
    train(config("two", **few), 2, *shown)
    done = run(words(config("one", **few), *shown), **VARIABLES)
    assert done.returncode == 0, done.stderr
    found = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([line["held_out_loss"] for line in map(json.loads, lines) if "held_out_loss" in line])
        pictures = [np.asarray(Image.open(path), float) for path in sorted((tmp_path / name / "sheets").glob("*.png"))]
        found[-1] += [picture.mean() for picture in pictures]
        assert len(pictures) == 6 and (tmp_path / name / "sheet.png").is_file()
        assert len(list((tmp_path / name / "snapshots").iterdir())) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("shard", [1, 2], ids=["DDP", "FSDP2"])
def test_processes_that_share_each_sample_learn_as_one(config, tmp_path, shard):
    """With a held-out loss and pictures on the way, for which all processes run the model together."""
    stages = [{"resolution": 64, "steps": 4, "batch": 4, "lr": 1e-3}]
    alone = config("alone", stages=stages)
    shown = ("data.validation=0.1", "run.sheet=[a red star]", "run.checkpoint_every=0")
    done = run(words(alone, *shown), **VARIABLES)
    assert done.returncode == 0, done.stderr
    count = 4 if shard == 1 else 2
    shared = config("shared", stages=stages, parallel={"context": 2, "shard": shard})
    train(shared, count, *shown)
    expected, found = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("alone", "shared")
    )
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "gradient_norm", "held_out_loss"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-3), (name, one["step"])
    assert (tmp_path / "shared" / "model" / "model_index.json").is_file()
