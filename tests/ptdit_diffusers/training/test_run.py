"""The loop, through the training script: settings, exact resume, stop signals, what a run writes."""

import json
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint
from ptdit_diffusers.training.record import Spikes
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.settings import LoopSettings, build, load_settings, parse_yaml
from scripts import train
from scripts.embedded_models import text_stage
from tests.processes import run

ROOT = Path(__file__).parents[3]
TINY = {
    "seed": 3,
    "steps": 4,
    "batch_size": 4,
    "accumulation": 2,
    "warmup": 1,
    "log_every": 1,
    "sheet_every": 2,
    "checkpoint_every": 2,
    "model": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1},
    "data": {"scenes": 40, "held_out_captions": 4},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config file with one tiny text run in tmp_path/run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"text": {"output_dir": str(tmp_path / "run"), **TINY}}), encoding="utf-8")
    return path


def run_script(config: Path, *flags: str) -> int:
    return train.main(["--config", str(config), "--stage", "text", *flags])


def assert_same(first: object, second: object) -> None:
    """Bit-equal, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, two in zip(first, second, strict=True):
            assert_same(one, two)
    else:
        assert first == second


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("muon", ["", "SelfAttention|DenseReluDense"] if hasattr(torch.optim, "Muon") else [""])
def test_two_steps_and_two_resumed_steps_equal_four_steps_bit_for_bit(tiny: Path, tmp_path: Path, muon: str) -> None:
    tiny.write_text(
        tiny.read_text(encoding="utf-8").replace("seed: 3", f"seed: 3\n  muon: {muon!r}"), encoding="utf-8"
    )
    assert run_script(tiny) == 0
    straight = load_checkpoint(tmp_path / "run")
    log = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    last = checkpoints(tmp_path / "run")[-1]
    last.rename(tmp_path / "aside")
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert run_script(tiny, "--set", "workers=1") == 0
    calls = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["calls"]
    assert [(call["from_step"], call["settings_before"]) for call in calls] == [(0, {}), (2, {"workers": 0})]
    resumed = load_checkpoint(tmp_path / "run")
    assert straight["step"] == resumed["step"] == 4
    assert_same(straight, resumed)
    assert [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line] == log


def test_processes_that_do_not_know_each_other_are_refused(tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        run_script(tiny)
    assert "2 processes were started but do not know each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("able", [True, False])
def test_slow_bfloat16_is_reported(tiny: Path, monkeypatch, caplog, able: bool) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able}, raising=False)
    assert run_script(tiny, "--set", "mixed_precision=bf16") == 0
    AcceleratorState._reset_state(True)
    assert ("mixed_precision=no is several times faster" in caplog.text) == (not able)


def test_a_run_writes_log_curve_sheets_record_and_a_loadable_export(tiny: Path, tmp_path: Path) -> None:
    assert run_script(tiny) == 0
    run = tmp_path / "run"
    assert [line["step"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4]
    assert {"loss", "lr", "samples_per_second", "seconds", "gradient_norm"} <= log_of(run)[0].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((run / "sheets").iterdir())] == ["step-00000002.txt", "step-00000004.txt"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["step"], record["settings"]["batch_size"]) == (3, 4, 4)
    assert torch.__version__.startswith(record["calls"][0]["versions"]["torch"].partition("+")[0])
    assert (run / "export" / "text_encoder" / "model.safetensors").exists()
    assert not list((run / "export").rglob("*.bin"))


@pytest.mark.parametrize("device, ahead", [("mps", False), ("cuda", True), ("cpu", False)])
def test_batches_are_copied_in_the_background_only_to_a_device_for_which_they_are_pinned(monkeypatch, device, ahead):
    """To Apple's GPUs such a copy reads memory that may be freed already."""

    class Sent(Exception):
        pass

    def note(batch: object, device: torch.device, non_blocking: bool = False) -> None:
        raise Sent(non_blocking)

    monkeypatch.setattr("ptdit_diffusers.training.run.send_to_device", note)
    loop = Run.__new__(Run)
    loop.accelerator, loop.step, loop.optimizers = SimpleNamespace(device=torch.device(device)), 0, []
    loop.task, loop.settings = SimpleNamespace(learning_rate=lambda step: 1.0), SimpleNamespace(accumulation=1)
    with pytest.raises(Sent, match=str(ahead)):
        loop.optimize(iter([{}]))


def test_a_stop_signal_saves_the_step_in_progress_and_the_run_can_go_on(tiny: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"

    def stop_after_the_first_step() -> None:
        while not (log.exists() and log.read_text(encoding="utf-8")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop_after_the_first_step)
    thread.start()
    run_script(tiny, "--steps", "100000", "--set", "sheet_every=0", "--set", "checkpoint_every=0")
    thread.join()
    state = load_checkpoint(run)
    assert 1 <= state["step"] < 100000
    assert not (run / "export").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_minutes_limit_saves_and_stops(tiny: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    run_script(tiny, "--steps", "100000", "--max-minutes", "0.01", "--set", "sheet_every=0")
    assert time.monotonic() - begin < 60
    assert 1 <= load_checkpoint(tmp_path / "run")["step"] < 100000


@pytest.mark.slow
def test_export_only_writes_the_components_of_the_newest_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script(tiny, "--export-only")
    assert stopped.value.code == 2 and "has no checkpoint" in capsys.readouterr().err
    run_script(tiny)
    weights = tmp_path / "run" / "export" / "text_encoder" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    assert run_script(tiny, "--export-only") == 0
    assert weights.read_bytes() == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepps=3", "stepps is not a setting; nearest: steps"),
        ("model.d_mode=3", "d_mode is not a setting; nearest: d_model"),
        ("steps=0", "steps=0 must be at least 1"),
        ("lr=-1", "lr=-1.0 must be above 0"),
        ("batch_size=many", "batch_size='many' must be of type int"),
        ("decay=cosin", "nearest: 'cosine'"),
        ("mixed_precision=fp16", "must be one of no, bf16"),
        ("lr", "must be NAME=VALUE"),
        ("betas=[0.9", "while parsing a flow sequence"),
    ],
)
def test_a_bad_setting_is_one_clear_line_and_exit_code_2(
    tiny: Path, tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script(tiny, "--set", setting)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_is_a_word_and_yes_is_true() -> None:
    """YAML 1.1 reads both as booleans, so that `mixed_precision: no` was refused."""
    given = train.overrides(train.make_parser().parse_args(["--config", "x", "--stage", "vae", "--set", "a=no"]))
    assert given["a"] == "no"
    values = {**parse_yaml("{mixed_precision: no, output_dir: run}"), "steps": 200, "batch_size": 1}
    assert build(LoopSettings, values, "here").mixed_precision == "no"
    assert build(Switch, parse_yaml("on_air: yes"), "here") == Switch(on_air=True)
    assert build(Switch, parse_yaml("on_air: False"), "here") == Switch(on_air=False)
    assert parse_yaml("[true love, falsetto, trueblood]") == ["true love", "falsetto", "trueblood"]
    numbers = parse_yaml("[1e-8, -2.5E+3, .5e2, 1e, e-8, 1e-8x, 3]")
    assert numbers == [1e-8, -2500.0, 50.0, "1e", "e-8", "1e-8x", 3]
    for wrong in ("on_air: [true]", "on_air: maybe"):
        with pytest.raises(ValueError, match="here.on_air=.* must be of type bool"):
            build(Switch, parse_yaml(wrong), "here")
    with pytest.raises(ValueError, match="here.lambda is not a setting"):
        build(Switch, {"lambda": 1}, "here")


@dataclass
class Switch:
    """A setting that is on or off."""

    on_air: bool


def test_whole_numbers_and_those_with_an_exponent_alone_become_floats(tiny: Path) -> None:
    given = parse_yaml("{lr: 1e-3, betas: [0.9, 1]}")
    settings = load_settings(tiny, "text", text_stage.TextStageSettings, given)
    assert settings.lr == 1e-3 and settings.betas == (0.9, 1.0)


def test_every_section_of_the_committed_config_is_valid() -> None:
    path = ROOT / "scripts" / "configs" / "shapes.yaml"
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sections.keys() <= train.STAGES.keys()
    for name in sections:
        load_settings(path, name, train.STAGES[name].settings_type, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"], 1),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
    ],
    ids=["accelerate on one process", "torchrun on two processes"],
)
def test_the_launchers_run_the_script(tiny: Path, tmp_path: Path, launcher: list[str], processes: int) -> None:
    words = ["-m", *launcher, "-m", "scripts.train", "--config", tiny, "--stage", "text"]
    done = run(words, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    assert load_checkpoint(folder)["step"] == 4
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["calls"][0]["processes"] == processes
    assert [line["step"] for line in log_of(folder) if "loss" in line] == [1, 2, 3, 4]


def test_a_gradient_far_above_the_usual_is_told_and_noise_is_not():
    choice, spikes = np.random.default_rng(0), Spikes()
    norms = np.exp(0.3 * choice.standard_normal(1000))
    assert not any(spikes.usual(norm) for norm in norms)
    assert 0.8 < spikes.usual(30.0) < 1.25
    assert spikes.usual(1.0) is None
