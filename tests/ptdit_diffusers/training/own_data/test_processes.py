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
FEW = {"stages": [{"resolution": 64, "steps": 4, "batch": 4, "lr": 1e-3}]}
SHOWN = ["run.sheet=[a red star, a blue ring, a heart]", "data.validation=0.1", "run.snapshots=2"]


def words(config: Path, *overrides: str) -> list[str]:
    return ["-m", MODULE, "--config", str(config), *(w for item in (*SETTINGS, *overrides) for w in ("--set", item))]


def losses(folder: Path) -> dict[int, float]:
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def encoded(alone: Path) -> str:
    return str(alone.parent / "encoded")


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


@pytest.fixture(scope="module")
def alone(write_config, tmp_path_factory) -> Path:
    """The folder of a run of one process with pictures, held-out losses and snapshots; encoded data are beside it."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(words(write_config(folder, "run", **FEW), *SHOWN), **VARIABLES)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def compare_losses(folder: Path, alone: Path, within: float) -> None:
    """Losses, gradients and held-out losses of each step are those of the run of one process."""
    found, expected = lines(folder), lines(alone)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "gradient_norm", "held_out_loss"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=within), (name, one["step"])


@pytest.mark.parametrize("shard", [1, 2], ids=["DDP", "FSDP2"])
def test_all_processes_draw_the_sheet_and_measure_the_held_out_loss(config, alone, tmp_path, shard):
    """Three prompts for two processes: one has more to do, and nobody waits for ever."""
    train(config("two", **FEW, data={"encoded": encoded(alone)}, parallel={"shard": shard}), 2, *SHOWN)
    compare_losses(tmp_path / "two", alone, within=1e-3)
    means = []
    for folder in (alone, tmp_path / "two"):
        paths = sorted((folder / "sheets").glob("*.png"))
        means.append([np.asarray(Image.open(path), float).mean() for path in paths])
        assert len(paths) == 6 and (folder / "sheet.png").is_file()
        assert len(list((folder / "snapshots").iterdir())) == 2
    assert means[0] == pytest.approx(means[1], rel=1e-3)


def test_four_processes_in_two_groups_learn_what_one_process_learns(config, alone, tmp_path):
    """HSDP: the groups have copies of the weights."""
    config = partial(config, **FEW, data={"encoded": encoded(alone)})
    train(config("four", parallel={"shard": 2}), 4, *SHOWN, "run.sheet=[]")
    compare_losses(tmp_path / "four", alone, within=1e-4)


def test_weights_that_processes_share_stay_in_float32_with_bf16(config, alone, tmp_path):
    config = partial(config, **FEW, data={"encoded": encoded(alone)})
    train(config("half", parallel={"shard": 2}, run={"precision": "bf16"}), 2, *SHOWN, "run.sheet=[]")
    assert losses(tmp_path / "half") == pytest.approx(losses(alone), rel=2e-2)
    weights = load_file(tmp_path / "half" / "model/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("shard", [1, 2], ids=["DDP", "FSDP2"])
def test_processes_that_share_each_sample_learn_as_one(config, alone, tmp_path, shard):
    """With a held-out loss and pictures on the way, for which all processes run the model together."""
    options = {"data": {"encoded": encoded(alone)}, "parallel": {"context": 2, "shard": shard}}
    train(config("shared", **FEW, **options), 4 if shard == 1 else 2, *SHOWN, "run.sheet=[a red star]")
    compare_losses(tmp_path / "shared", alone, within=1e-3)
    assert (tmp_path / "shared" / "model" / "model_index.json").is_file()
