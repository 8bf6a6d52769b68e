"""`ptdit lora`: which module is launched, that every option goes on to it, and one line for what is missing."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from PIL import Image

from ptdit_diffusers.cli import main
from ptdit_diffusers.commands import launching, lora
from ptdit_diffusers.commands.processes import run_processes
from ptdit_diffusers.training import processes
from tests.processes import start, wait

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """What can be imported, as the command sees it."""
    names = {"matplotlib"}
    monkeypatch.setattr(lora, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.mark.parametrize("program, name", [("lora", "train"), ("distill", "distill")])
@pytest.mark.parametrize("place", ["lora", "ptdit_diffusers.lora"], ids=["in a clone", "installed"])
def test_all_options_go_to_the_training_and_its_exit_code_comes_back(
    monkeypatch, tmp_path, installed, place, program, name
):
    called, module = [], f"{place}.{name}"
    monkeypatch.chdir(ROOT if place == "lora" else tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # so that what the command adds is taken back
    installed.add(place)
    monkeypatch.setattr(processes, "has_launch_settings", lambda: False)
    training = SimpleNamespace(main=lambda words: called.append(words) or 7)
    monkeypatch.setattr(launching, "import_module", lambda name: training if name == module else None)
    words = ["--config", "x.yaml", "--rank", "3", "--flip", "--help"]
    with pytest.raises(SystemExit) as ended:
        main([program, *words])
    assert ended.value.code == 7
    assert called == [words]
    monkeypatch.setattr(processes, "has_launch_settings", lambda: True)
    monkeypatch.setattr(launching, "launch", lambda name, words: called.append((name, words)) or 2)
    with pytest.raises(SystemExit) as ended:
        main([program, *words])
    assert ended.value.code == 2
    assert called[1:] == [(module, words)]


@pytest.mark.parametrize(
    "flags, gpus, count",
    [([], 2, 2), (["--num-processes", "3"], 1, 3), (["--cpu", "--num_processes", "2"], 0, 2), (["--cpu"], 2, 1)],
    ids=str,
)
def test_it_runs_as_many_processes_as_were_asked_for_or_one_for_each_gpu(monkeypatch, installed, flags, gpus, count):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(processes, "has_launch_settings", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    ran = []
    monkeypatch.setattr(launching, "run_processes", lambda module, words, count: ran.append((words, count)) or 0)
    training = SimpleNamespace(main=lambda words: ran.append((words, 1)) or 0)
    monkeypatch.setattr(launching, "import_module", lambda name: training)
    with pytest.raises(SystemExit) as ended:
        main(["lora", "--rank", "3", *flags, "--flip"])
    assert ended.value.code == 0
    assert ran == [(["--rank", "3", "--flip"], count)]
    assert os.environ["ACCELERATE_USE_CPU"] == str("--cpu" in flags).lower()


def test_an_impossible_number_of_processes_is_one_line(monkeypatch, capsys, installed):
    monkeypatch.chdir(ROOT)
    assert main(["lora", "--num-processes", "0"]) == 2
    assert "0 is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be sent to one process")
def test_sigterm_to_the_command_stops_all_processes_and_a_checkpoint_is_written(tiny_model_folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "a.png")
    places = ["--base", tiny_model_folder, "--data", data, "--output-dir", out]
    words = ["-m", "ptdit_diffusers.cli", "lora", "--cpu", "--num-processes", "2", *places]
    words += ["--rank", "2", "--log-every", "1", "--checkpoint-every", "0", "--max-steps", "100000"]
    with start(words) as running:
        log = out / "log.jsonl"
        while not (log.exists() and log.read_text()) and running.returncode is None:
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGTERM)
        (done,) = wait([running])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((out / "run.json").read_text())["calls"][0]["processes"] == 2
    (checkpoint,) = out.glob("checkpoint-*")
    assert f"stopped at step {int(checkpoint.name[-8:])} of" in done.stderr
    with FileLock(out / ".lock", timeout=0):
        pass  # nobody holds it any more


def test_the_exit_code_is_that_of_the_process_that_failed_and_the_others_are_ended(monkeypatch, tmp_path):
    (tmp_path / "trains.py").write_text(
        "import os, sys, time\n"
        "assert os.environ['WORLD_SIZE'] == '2' and sys.argv[1:] == ['--rank', '3']\n"
        "sys.exit(2) if os.environ['RANK'] == '1' else time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    assert run_processes("trains", ["--rank", "3"], 2, seconds=0.1) == 2
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_what_accelerate_launches_ends_with_its_own_exit_code_and_no_traceback(monkeypatch, tmp_path, capfd):
    (tmp_path / "trains.py").write_text("import sys; sys.exit(2)")
    (tmp_path / "accelerate").mkdir()
    wanted = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "use_cpu": True}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(json.dumps(wanted))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launching.launch("trains", []) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_without_the_package_and_outside_a_clone_it_says_where_to_run(monkeypatch, tmp_path, capsys, installed):
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "--rank", "3"]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err


def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, installed):
    monkeypatch.chdir(ROOT)
    installed.clear()
    assert main(["lora", "--rank", "3"]) == 2
    assert "training needs matplotlib: pip install '.[train]' in a clone of the repository" in capsys.readouterr().err
