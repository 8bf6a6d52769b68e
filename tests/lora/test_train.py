"""The real script: it learns, resumes bit for bit, survives a kill, agrees over processes, and refuses bad input."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lora.train import kept_batch
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.data import encode
from ptdit_diffusers.training.processes import lock_folder
from ptdit_diffusers.training.run import Run
from tests.processes import run, run_ranks, start, started_ranks, wait

ROOT = Path(__file__).resolve().parents[2]
FILE = "lora/pytorch_lora_weights.safetensors"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def same(first: Path, second: Path) -> bool:
    one, two = load_file(first / FILE), load_file(second / FILE)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


HARD = ["--dropout", "0.2", "--ema", "0.9", "--proxy-mode", "random", "--schedule", "cosine", "--accumulation", "2"]


def test_two_steps_and_two_more_equal_four_bit_for_bit(train, tmp_path):
    assert train("straight", *HARD) == 0
    assert train("resumed", *HARD, "--stop-after", "2") == 0
    assert not (tmp_path / "resumed" / "lora").exists()
    assert train("resumed", *HARD, "--resume") == 0
    assert same(tmp_path / "straight", tmp_path / "resumed")
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")


def test_training_from_a_cache_constructs_neither_vae_nor_text_encoder(train, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("constructed")

    monkeypatch.setattr("transformers.T5EncoderModel.__init__", refuse)
    monkeypatch.setattr("ptdit_diffusers.models.autoencoder_ptdit.AutoencoderKLOpenSoraPlan.__init__", refuse)
    assert train("out", "--max-steps", "1") == 0


@pytest.mark.slow
def test_a_run_learns_shows_pictures_and_its_file_loads_everywhere(train, tmp_path, tiny_model_folder):
    flags = ["--max-steps", "40", "--targets", "all-linear", "--rank", "8", "--caption-dropout", "0", "--alpha", "16"]
    looks = ["--validation-prompts", "a red star", "--validation-steps", "2", "--gradient-checkpointing"]
    assert train("out", *flags, *looks) == 0
    out = tmp_path / "out"
    found = losses(out)
    assert sum(found[-10:]) < 0.9 * sum(found[:10])
    assert sorted(path.name for path in (out / "validation").iterdir()) == [
        f"step-{step:08d}-0.png" for step in (0, 10, 20, 40)
    ]
    assert {path.name for path in (out / "lora").iterdir()} >= {"README.md", "sheet.png", "settings.json", "comfyui"}
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        return pipe("a star", num_inference_steps=2, generator=torch.manual_seed(0), output_type="latent").images

    plain = latents()
    pipe.load_lora_weights(out / "lora", adapter_name="mine")
    with_file = latents()
    pipe.fuse_lora()
    torch.testing.assert_close(latents(), with_file, atol=1e-4, rtol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(load_file(out / "lora/comfyui/out.safetensors"))
    torch.testing.assert_close(latents(), with_file)
    assert (with_file - plain).abs().max() > 1e-3


def command_line(cached: Path, base: Path, out: Path, *flags: str, module: str = "lora.train") -> list[object]:
    """The words of a run with the settings of the fixture `train`."""
    places = ["--base", base, "--cache-dir", cached, "--output-dir", out]
    same_as_fixture = ["--rank", "2", "--lr", "0.01", "--log-every", "1", "--precision", "fp32", "--max-steps", "4"]
    return ["-m", module, *places, *same_as_fixture, *flags]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(train, cached, tiny_model_folder, tmp_path):
    flags = ["--checkpoint-every", "1", "--batch-size", "2", "--max-steps", "100000"]
    words = command_line(cached, tiny_model_folder, tmp_path / "killed", *flags)
    with start(words, real=True, ACCELERATE_USE_CPU="true"):
        deadline = time.monotonic() + 300
        while not list((tmp_path / "killed").glob("checkpoint-*[2-9]")) and time.monotonic() < deadline:
            time.sleep(0.02)
    half_written = tmp_path / "killed" / "unfinished-checkpoint"  # as a kill in the middle of writing leaves it
    half_written.mkdir(exist_ok=True)
    (half_written / "state.pt").write_bytes(b"half")
    reached = int(max((tmp_path / "killed").glob("checkpoint-*")).name.rpartition("-")[2])
    steps = ["--max-steps", str(reached + 2), "--checkpoint-every", "1"]
    assert train("killed", "--resume", *steps) == 0
    assert train("straight", *steps) == 0
    assert same(tmp_path / "killed", tmp_path / "straight")


def test_ctrl_c_saves_and_stops(train, tmp_path):
    def interrupt() -> None:
        log = tmp_path / "out" / "log.jsonl"
        while not log.exists() or not log.read_text():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert train("out", "--max-steps", "100000", "--checkpoint-every", "0") == 0
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
    assert not (tmp_path / "out" / "lora").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no Ctrl-C that can be sent to one process")
@pytest.mark.parametrize("launched", [False, True], ids=["in the same process", "through accelerate launch"])
def test_ctrl_c_in_the_command_waits_for_the_checkpoint_and_says_how_to_go_on(
    cached, tiny_model_folder, tmp_path, launched
):
    flags = ["--max-steps", "100000", "--checkpoint-every", "0"]
    words = command_line(cached, tiny_model_folder, tmp_path / "out", *flags, module="ptdit_diffusers.cli")
    words.insert(2, "lora")
    home = tmp_path / "home"
    if launched:  # as `accelerate config` leaves it
        (home / "accelerate").mkdir(parents=True)
        wanted = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1}
        (home / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(wanted | {"use_cpu": True}))
    with start(words, real=True, HF_HOME=str(home)) as running:
        log = tmp_path / "out" / "log.jsonl"
        while not (log.exists() and log.read_text()) and running.returncode is None:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        (done,) = wait([running])
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    step = int(checkpoint.name.rpartition("-")[2])
    said = ("stopping: a checkpoint is written after this step", f"stopped at step {step} of", "go on with --resume")
    places_found = [done.stderr.find(words) for words in said]
    assert places_found == sorted(places_found) and places_found[0] >= 0, done.stderr


@pytest.mark.slow
def test_two_processes_give_the_lora_of_one_with_twice_the_batch(train, cached, tiny_model_folder, tmp_path):
    words = command_line(cached, tiny_model_folder, tmp_path / "two", "--batch-size", "1")
    for done in run_ranks(words, 2, ACCELERATE_USE_CPU="true"):
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["calls"][0]["processes"] == 2
    assert train("one", "--batch-size", "2") == 0
    one, two = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "two" / FILE)
    assert one.keys() == two.keys()
    for key in one:  # gradients are summed in another order; Adam's first steps are as large as the rate, 0.01
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(train, cached, tiny_model_folder, tmp_path):
    steps = ["--max-steps", "2", "--checkpoint-every", "1"]
    assert train("straight", *steps) == 0
    assert train("out", *steps, "--stop-after", "1") == 0
    words = command_line(cached, tiny_model_folder, tmp_path / "out", "--batch-size", "2", "--resume", *steps)
    first, second = run_ranks(words, 2, ACCELERATE_USE_CPU="true")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "the run began with batches of 2 samples, and keeps them: 2 processes share them" in first.stderr
    one, two = load_file(tmp_path / "straight" / FILE), load_file(tmp_path / "out" / FILE)
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


def test_more_processes_than_samples_of_a_batch_are_refused():
    assert kept_batch({"processes": 3, "global_batch": 6}, 2, 4) == 6
    assert kept_batch({"processes": 3}, 2, 3) == kept_batch({"processes": 6}, 2, 3, 2) == 6  # checkpoints of before
    with pytest.raises(ValueError, match="4 processes cannot share the 2 samples.*nearest: --num-processes 2"):
        kept_batch({"processes": 1, "global_batch": 2}, 2, 4)


@pytest.mark.slow
def test_what_the_main_process_refuses_is_one_line_of_all_processes(tiny_model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no picture")
    words = command_line(tmp_path / "cache", tiny_model_folder, tmp_path / "out", "--data", tmp_path / "data")
    with ExitStack() as stack:
        ranks = [stack.enter_context(each) for each in started_ranks(words, 2, ACCELERATE_USE_CPU="true")]
        while None in (codes := [each.returncode for each in ranks]):
            time.sleep(0.05)
        lines = [line for each in ranks for line in each.text("stderr").splitlines() if line.startswith("lora: ")]
    assert codes == [2, 2] and len(lines) == 1 and "a.png is not a picture" in lines[0]
    assert not list((tmp_path / "cache").iterdir()) and not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_pictures_are_encoded_keeps_what_is_done_and_is_one_line(
    train, pictures, tmp_path, capsys, caplog, monkeypatch, number
):
    fit, calls = encode.fit, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(number)
        return fit(*arguments)

    monkeypatch.setattr(encode, "fit", stop_at_the_third)
    words = ["--data", pictures, "--cache-dir", tmp_path / "cache", "--max-steps", "1"]
    assert train("out", *words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "lora: interrupted; what was encoded and saved is kept."
    (shard,) = (tmp_path / "cache").iterdir()
    with safe_open(shard, "pt") as file:
        assert len(list(file.keys())) == 4  # mean and standard deviation of two
    caplog.set_level("INFO")
    assert train("out", *words) == 0
    assert "the cache lacks 3 of 5 pictures" in caplog.text


def test_a_full_disk_while_pictures_are_encoded_or_the_lora_is_written_is_one_line(
    train, pictures, tmp_path, capsys, monkeypatch
):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    words = ["--data", pictures, "--cache-dir", tmp_path / "cache", "--max-steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("ptdit_diffusers.training.latents.save_file", full)
        assert train("out", *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lora: ") and "No space left on device" in error
        assert not list((tmp_path / "cache").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("lora.export.write_tensors", full)
        assert train("out", *words) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert (
            error.startswith("lora: stopped at step 1: ") and "go on from checkpoint-00000001 with --resume" in error
        )
        assert [path.name for path in (tmp_path / "out").iterdir() if "lora" in path.name] == []
    assert train("out", *words, "--resume") == 0
    assert (tmp_path / "out" / "lora" / "README.md").is_file()


def test_an_output_folder_in_use_is_refused(train, tmp_path, capsys):
    lock = lock_folder(tmp_path / "out", "output_dir")
    assert train("out", "--max-steps", "1") == 2
    assert "is in use by another run; wait for its end, or give another one" in capsys.readouterr().err
    lock.release()
    assert train("out", "--max-steps", "1") == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_what_comes_out_has_the_usual_rights_and_names_no_folder_of_this_machine(train, tmp_path):
    shown = ["--validation-prompts", "a red star", "--validation-steps", "1"]
    before = os.umask(0o027)
    try:
        assert train("out", "--max-steps", "1", *shown) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}
    results = [*(tmp_path / "out" / "lora").rglob("*.*"), *(tmp_path / "out" / "validation").iterdir()]
    assert len(results) >= 6
    for path in results:
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_fsdp2_gives_the_lora_of_one_process(train, cached, tiny_model_folder, tmp_path):
    """FSDP2, with everything that needs whole weights: pictures, a checkpoint on the way, the average, DoRA."""
    shown = ["--validation-prompts", "a red star", "--validation-steps", "1"]
    flags = ["--checkpoint-every", "2", "--ema", "0.9", "--dora", "--gradient-checkpointing", *shown]
    module, variables = "tests.lora.fsdp_on_cpu", fsdp2_variables()
    words = command_line(cached, tiny_model_folder, tmp_path / "two", "--batch-size", "1", *flags, module=module)
    first, second = run_ranks(words, 2, **variables)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "shared by the processes" in first.stderr
    assert train("one", "--batch-size", "2", *flags) == 0
    one, two = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "two" / FILE)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_processes_that_share_each_sample_give_the_lora_of_one(train, cached, tiny_model_folder, tmp_path, wrapper):
    """Two data ranks of two processes each, with all that calls the model: pictures on the way, random proxies."""
    shown = ["--validation-prompts", "a red star", "--validation-steps", "1"]
    flags = ["--proxy-mode", "random", "--gradient-checkpointing", "--accumulation", "2", *shown]
    variables, module, count = {"ACCELERATE_USE_CPU": "true"}, "lora.train", 4
    if wrapper == "FSDP2":
        variables, module, count = fsdp2_variables(), "tests.lora.fsdp_on_cpu", 2
    alone = ["--batch-size", str(count // 2), *flags]
    flags = ["--context-parallel", "2", "--batch-size", "1", *flags]
    words = command_line(cached, tiny_model_folder, tmp_path / "shared", *flags, module=module)
    for done in run_ranks(words, count, **variables):
        assert done.returncode == 0, done.stderr
    assert train("one", *alone) == 0
    one, shared = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "shared" / FILE)
    assert one.keys() == shared.keys()
    for key in one:  # rounding; a gradient that is twice too small is seen in the log: Adam hides it from the weights
        torch.testing.assert_close(one[key], shared[key], atol=2e-4, rtol=1e-3)
    logs = [
        [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        for folder in ("one", "shared")
    ]
    for name in ("loss", "gradient_norm"):
        one, shared = ([line[name] for line in log if name in line] for log in logs)
        assert len(one) == 4 and one == pytest.approx(shared, rel=1e-3)


def fsdp2_variables() -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for our configuration of FSDP2."""
    config = yaml.safe_load((ROOT / "lora" / "configs" / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    variables = {name.upper(): str(value) for name, value in config.items()}
    variables["FSDP_TRANSFORMER_CLS_TO_WRAP"] = variables.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    return variables | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--context-parallel", "2"],
            "context_parallel=2 processes cannot share a sample where there are 1 in all; "
            "nearest: 1, or start 2 processes",
        ),
        (["--context-parallel", "2", "--dropout", "0.1"], "other inputs of the same layers; nearest: dropout=0"),
        (["--rank", "0"], "rank=0 must be at least 1"),
        (["--targets", "to_z"], "'to_z' is no linear layer"),
        (["--base", "nowhere/at-all"], "base 'nowhere/at-all' is no folder and cannot be had from the Hub"),
        (["--data", "nowhere"], "data 'nowhere' is neither a folder nor a file"),
        (["--prior-prompts", "nowhere.txt"], "prior_prompts 'nowhere.txt' is no file"),
        (["--base-weights", "fp8", "--dora"], "dora reads the base weights, which base_weights='fp8' forbids"),
        (["--precision", "fp16"], "precision='fp16' does not train on a CPU; nearest: 'bf16'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1; nearest: --lr"),
        (["--raank", "1"], "unrecognized arguments: --raank 1; nearest: --rank"),
        (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--warmup", "5"], "warmup=5 is longer than the 4 steps of the run; nearest: 4"),
        (["--epochs", "1", "--warmup", "5"], "warmup=5 is longer than the 3 steps of the run; nearest: 3"),
        (["--optimizer", "prodigy", "--lr", "1.5e-3"], "optimizer='prodigy' finds by itself; nearest: 1"),
        (["--optimizer", "schedule_free_adamw", "--schedule", "cosine"], "nearest: 'constant_with_warmup'"),
        (["--optimizer", "schedule_free_adamw", "--ema", "0.9"], "a constant rate by itself; nearest: 0."),
        (["--bucket-step", "20"], "bucket_step=20 is not a multiple of 16 (VAE 8 x patch 2); nearest: 16 or 32"),
        (["--bucket-step", "48"], "resolution=64 is not a multiple of bucket_step=48; nearest: 48 or 96"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_training(train, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert train("out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lora: ") and message in error
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_processes_that_do_not_know_each_other_are_refused(train, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("out") == 2
    assert "lora: 2 processes were started but do not know each other" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_used_folder_needs_resume_and_resume_the_same_settings(train, capsys):
    assert train("out", "--max-steps", "2") == 0
    assert train("out") == 2
    assert "holds an earlier run; go on with --resume" in capsys.readouterr().err
    assert train("out", "--resume", "--rank", "3") == 2
    assert "made with other settings: rank was 2, is 3" in capsys.readouterr().err
    assert train("out", "--resume", "--start", "moved-away", "--dropout", "0.1") == 2
    assert "made with other settings: dropout was 0.0, is 0.1. Give" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_no_checkpoint_is_written_whose_loss_or_weights_are_not_finite(train, tmp_path, capsys, monkeypatch, broken):
    optimize = Run.optimize

    def step_that_breaks_the_weights(run, batches):
        optimize(run, batches)
        if run.step == 2:
            run.trained[-1].data[0, 0] = torch.nan

    if broken == "weights":
        monkeypatch.setattr(Run, "optimize", step_that_breaks_the_weights)
    lr = "1e30" if broken == "loss" else "1e-3"
    assert train("out", "--lr", lr, "--max-steps", "4", "--log-every", "4", "--checkpoint-every", "1") == 1
    assert "the loss is nan at step 2; try a lower lr, in another output_dir" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000001"]
    assert not (tmp_path / "out" / "lora").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_stops_with_a_line_and_keeps_the_last_checkpoint(train, capsys, tmp_path):
    import resource

    assert train("out", "--max-steps", "1", "--checkpoint-every", "1") == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert train("out", "--resume", "--max-steps", "3", "--checkpoint-every", "1") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "stopped at step 2: the checkpoint could not be written (" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000001"]
    assert train("out", "--resume", "--max-steps", "3", "--checkpoint-every", "1") == 0


OLDER = """
import runpy, sys, torch
for owner, name in ((torch.optim, "Muon"), (torch.cpu, "get_capabilities")):
    vars(owner).pop(name, None)
torch.distributed.is_available = lambda: False
sys.modules["torch.distributed.fsdp"] = None
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_training_needs_neither_names_of_newer_torch_nor_a_build_with_distributed(cached, tiny_model_folder, tmp_path):
    """torch 2.6 has no Muon and no get_capabilities, builds for Windows with ROCm and for Jetson no distributed."""
    words = command_line(cached, tiny_model_folder, tmp_path / "out", "--max-steps", "1")
    done = run(["-c", OLDER, *words[1:]], real=True)
    assert done.returncode == 0 and (tmp_path / "out" / "lora").is_dir(), done.stderr
