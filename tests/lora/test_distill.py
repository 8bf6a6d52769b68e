"""The real command: paths of the teacher, a student that learns, resumes bit for bit, and loads; refused input."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora import paths as paths_module
from lora.distill import main
from lora.distill_config import DistillSettings
from lora.distill_export import shift_of
from lora.distill_task import SegmentBatches, SegmentTask, segment_batch
from lora.paths import Paths, noise_levels
from lora.tdm import TDMBatches
from ptdit_diffusers import PTDiTModularPipeline
from ptdit_diffusers.core.few_steps import LORA_FILE
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.base_model import BaseModel
from tests.processes import run_ranks

from .conftest import CAPTIONS

CHUNK = paths_module.CHUNK
FILE = "lora/pytorch_lora_weights.safetensors"
SMALL = (
    "--steps 2 --points 4 --teacher-steps 8 --paths 5 --held-out 2 --rank 2 --batch-size 2 --max-steps 4 --lr 0.01 "
    "--log-every 1 --checkpoint-every 2 --precision fp32"
).split()


@pytest.fixture(scope="module")
def made(prompts, tiny_model_folder, tmp_path_factory) -> Path:
    """Paths of the tiny model, two in a file."""
    folder = tmp_path_factory.mktemp("paths") / "paths"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths_module, "CHUNK", 2)
        assert run(tiny_model_folder, prompts, folder.parent / "out", "--paths-dir", folder, "--stage", "paths") == 0
    return folder


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(paths_module, "CHUNK", 2)


def run(base: Path, prompts: Path, output: Path, *flags: object) -> int:
    AcceleratorState._reset_state(True)
    words = ["--base", base, "--prompts", prompts, "--output-dir", output, *SMALL, *flags]
    return main([str(word) for word in words])


@pytest.fixture
def distill(prompts, made, tiny_model_folder, tmp_path):
    """Run the command on those paths: distill("output", "--flag", ...) -> exit code."""
    return lambda output, *flags: run(tiny_model_folder, prompts, tmp_path / output, "--paths-dir", made, *flags)


def settings(made: Path, base: Path, **more: object) -> DistillSettings:
    values = {"steps": 2, "points": 4, "teacher_steps": 8, "paths": 5, "held_out": 2, "rank": 2, "batch_size": 3}
    return DistillSettings(
        base=str(base), output_dir=str(made.parent / "x"), paths_dir=str(made), prompts="x", **(values | more)
    )


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("paths-*.safetensors"))


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_path_is_the_one_that_the_pipeline_goes(made, tiny_model_folder):
    paths = Paths(BaseModel(str(tiny_model_folder)), settings(made, tiny_model_folder), CAPTIONS)
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)
    for index in (1, 4):
        seen = []
        pipe(
            paths.captions[index],
            latents=paths.noise(index)[None],
            num_inference_steps=8,
            guidance_scale=4.0,
            output_type="latent",
            callback_on_step_end=lambda _, step, time, tensors, seen=seen: seen.append(tensors["latents"]) or {},
        )
        expected = torch.cat([paths.noise(index)[None], *seen[1::2]])
        torch.testing.assert_close(paths.states(index, range(5)), expected, atol=2e-3, rtol=2e-3)  # float16
    assert paths.captions == [*CAPTIONS, *CAPTIONS[:2]]
    assert paths.times[0] == 1 and paths.times[-1] == 0 and not paths.missing()


def test_stopped_and_damaged_paths_are_made_again_bit_for_bit(prompts, made, tiny_model_folder, tmp_path):
    folder = shutil.copytree(made, tmp_path / "paths")
    first, second, last = chunk_files(folder)
    whole = {path.name: path.read_bytes() for path in (first, second, last)}
    second.unlink()
    last.write_bytes(whole[last.name][:100])
    times = first.stat().st_mtime_ns
    words = ["--paths-dir", folder, "--stage", "paths", "--path-batch", "1"]
    assert run(tiny_model_folder, prompts, tmp_path / "out", *words) == 0
    assert first.stat().st_mtime_ns == times
    for path in (second, last):
        one, two = load_file(path)["states"], load_file(made / path.name)["states"]
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)  # batches of another size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance", "3"], "guidance was 4.0, is 3.0"),
        (["--teacher-steps", "12"], "teacher_steps was 8, is 12"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--resolution", "96"], "resolution was 64, is 96"),
        (["--steps", "4", "--points", "8"], "points was 4, is 8"),
    ],
    ids=str,
)
def test_paths_of_other_settings_are_refused(distill, capsys, flags, words):
    assert distill("out", *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("distill: paths_dir") and words in line and "another paths_dir" in line


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("scheduler/scheduler_config.json", '"base_image_seq_len": ', '"base_image_seq_len": 1', "whose shift sets"),
        ("transformer/config.json", '"num_windows": 4', '"num_windows": 16', "the windows and proxies changed"),
        ("transformer/diffusion_pytorch_model.safetensors", "", "", "the weights or the"),
    ],
    ids=["shift", "windows", "weights"],
)  # fmt: skip
def test_paths_of_another_teacher_are_refused(
    prompts, made, tiny_model_folder, tmp_path, capsys, file, old, new, words
):
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    path = other / file
    if old:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    else:
        path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    assert run(other, prompts, tmp_path / "out", "--paths-dir", made, "--resolution", "64") == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_paths_of_other_captions_or_from_another_folder_are_refused(
    prompts, made, tiny_model_folder, tmp_path, capsys
):
    other = tmp_path / "other.txt"
    other.write_text("a red star\na blue star\n", encoding="utf-8")
    assert run(tiny_model_folder, other, tmp_path / "out", "--paths-dir", made) == 2
    assert "path 1 in" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "'a blue ring above a white square', it is 'a blue star' now" in line
    foreign = tmp_path / "paths"
    words = ["--paths-dir", foreign, "--stage", "paths", "--guidance", "2", "--paths", "3"]
    assert run(tiny_model_folder, prompts, tmp_path / "out", *words) == 0
    shutil.copy(chunk_files(made)[0], chunk_files(foreign)[0])
    assert run(tiny_model_folder, prompts, tmp_path / "out", *words) == 2
    assert "was made by another teacher or with other settings" in capsys.readouterr().err.splitlines()[-1]


def test_the_times_are_those_of_the_sampler_with_its_shift(tmp_path):
    base = BaseModel("shapes-128")
    levels = noise_levels(base, 4, 128, 1)
    torch.testing.assert_close(levels, [1.0, 0.8194, 0.6019, 0.3351, 0.0], atol=1e-4, rtol=0)
    assert shift_of(levels) == pytest.approx((64 / 28) ** 0.5, abs=1e-4)


# --- segments --------------------------------------------------------------------------------------------------------


def test_targets_lead_from_the_start_of_a_segment_to_its_end(made, tiny_model_folder):
    paths = Paths(BaseModel(str(tiny_model_folder)), settings(made, tiny_model_folder), CAPTIONS)
    level = 0.5
    batch = segment_batch(paths, [0, 3, 4], torch.tensor([0, 1, 0]), torch.tensor([0.0, 0.0, 0.5]))
    begin = torch.tensor([1.0, level, 1.0]).view(-1, 1, 1, 1, 1)
    end = torch.tensor([level, 0.0, level]).view(-1, 1, 1, 1, 1)
    assert paths.times == [1.0, 0.75, 0.5, 0.25, 0.0]  # the tiny model's own size has no shift
    ends = torch.stack([paths.states(index, [place])[0] for index, place in ((0, 2), (3, 4), (4, 2))])
    reached = batch["noisy"] - (batch["time"].view_as(begin) - end) * batch["target"]
    torch.testing.assert_close(reached, ends, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch["time"][:2].view(-1), begin[:2].view(-1))
    torch.testing.assert_close(batch["time"][2], (1 + torch.tensor(level)) / 2)


def test_batches_are_functions_of_their_number_and_leave_out_held_out_paths(made, tiny_model_folder):
    base = BaseModel(str(tiny_model_folder))
    chosen = settings(made, tiny_model_folder, batch_size=4)
    one, two = (SegmentBatches(Paths(base, chosen, CAPTIONS), chosen, 0, 1) for _ in range(2))
    late, early = one[5], one[0]
    for batch, again in ((late, two[5]), (early, two[0])):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert sorted(late["segment"].tolist()) == [0, 0, 1, 1]
    assert {one.index(place) for place in range(30)} == {2, 3, 4}
    halves = [SegmentBatches(Paths(base, half, CAPTIONS), half, rank, 2)[5] for rank in (0, 1)
              for half in [settings(made, tiny_model_folder, batch_size=2)]]  # fmt: skip
    assert torch.equal(torch.cat([half["noisy"] for half in halves]), late["noisy"])


@pytest.mark.parametrize("kind", [SegmentBatches, TDMBatches])
def test_any_number_of_processes_goes_on_with_the_batches_of_a_run(made, tiny_model_folder, kind):
    chosen = settings(made, tiny_model_folder, batch_size=4)
    paths = Paths(BaseModel(str(tiny_model_folder)), chosen, CAPTIONS)
    whole = kind(paths, chosen, 0, 1)[5]
    for processes in (2, 3, 4):
        parts = [kind(paths, chosen, rank, processes, global_batch=4)[5] for rank in range(processes)]
        for name in whole.keys() - {"weight"}:
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        name = "time" if kind is SegmentBatches else "share"
        means = [part[name].mean() * part["weight"] for part in parts]  # as the loss is summed up
        torch.testing.assert_close(sum(means) / processes, whole[name].mean() * whole["weight"])


@pytest.mark.parametrize(
    "flags", [["--inner", "0.5"], ["--rank", "0", "--lr", "1e-4"]], ids=["adapter", "all weights"]
)
def test_two_steps_and_two_more_equal_four_bit_for_bit(distill, tmp_path, flags):
    assert distill("straight", *flags) == 0
    assert distill("resumed", *flags, "--stop-after", "2") == 0
    assert distill("resumed", *flags, "--resume") == 0
    file = FILE if "--inner" in flags else "model/transformer/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("straight", "resumed"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    logs = [
        (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines() for name in ("straight", "resumed")
    ]
    lines = [[(line["step"], line.get("loss"), line.get("held_out_error_end")) for line in map(json.loads, log)]
             for log in logs]  # fmt: skip
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(prompts, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths_module, "CHUNK", CHUNK)  # as the other processes have it
    sizes = ["--paths-dir", tmp_path / "paths", "--batch-size", "3", "--max-steps", "2", "--checkpoint-every", "1"]
    assert run(tiny_model_folder, prompts, tmp_path / "straight", *sizes) == 0
    assert run(tiny_model_folder, prompts, tmp_path / "out", *sizes, "--stop-after", "1") == 0
    words = ["-m", "lora.distill", "--base", tiny_model_folder, "--prompts", prompts, "--output-dir", tmp_path / "out"]
    first, second = run_ranks([*words, *SMALL, *sizes, "--resume"], 2, ACCELERATE_USE_CPU="true")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "the run began with batches of 3 samples, and keeps them: 2 processes share them" in first.stderr
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "out"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


def test_without_the_adapter_the_student_is_the_teacher(made, tiny_model_folder):
    AcceleratorState._reset_state(True)
    base = BaseModel(str(tiny_model_folder))
    chosen = settings(made, tiny_model_folder)
    task = SegmentTask(chosen, base, Paths(base, chosen, CAPTIONS), Accelerator(cpu=True))
    for name, parameter in task.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = task.data[0]
    inputs = [batch[name] for name in ("noisy", "time", "text", "mask")]
    with torch.no_grad():
        student = task.predict(*inputs)
        with task.teacher():
            teacher = task.predict(*inputs)
        assert torch.equal(task.predict(*inputs), student)
        task.model = base.load_transformer(torch.float32, "none", torch.device("cpu"))
        torch.testing.assert_close(teacher, task.predict(*inputs), atol=1e-6, rtol=1e-6)
    assert (student - teacher).abs().max() > 0.1


@pytest.mark.slow
def test_a_student_learns_its_teachers_paths(prompts, tiny_model_folder, tmp_path):
    more = ["--rank", "16", "--max-steps", "60", "--batch-size", "8", "--ema", "0.9", "--checkpoint-every", "0"]
    assert run(tiny_model_folder, prompts, tmp_path / "out", *more, "--log-every", "10") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_videos_have_paths_and_students_too(prompts, tiny_model_folder, tmp_path):
    flags = ["--num-frames", "5", "--paths", "3", "--max-steps", "1", "--validation-prompts", "a red star"]
    assert run(tiny_model_folder, prompts, tmp_path / "out", *flags) == 0
    shapes = [load_file(path)["states"].shape for path in chunk_files(tmp_path / "out" / "paths")]
    assert shapes == [(2, 5, 4, 2, 8, 8), (1, 5, 4, 2, 8, 8)]
    base = BaseModel(str(tiny_model_folder))
    assert noise_levels(base, 2, 64, 5)[1] == pytest.approx(2**0.5 / (1 + 2**0.5))  # two latent frames shift the times
    with Image.open(tmp_path / "out" / "validation" / "teacher-0.png") as strip:
        assert strip.size == (5 * 64, 64)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_student_loads_and_says_what_it_is(distill, tmp_path, tiny_model_folder):
    assert distill("tiny-2steps", "--validation-prompts", "a red star", "--max-steps", "2") == 0
    folder = tmp_path / "tiny-2steps"
    files = {path.relative_to(folder / "lora").as_posix() for path in (folder / "lora").rglob("*") if path.is_file()}
    comfyui = "comfyui/tiny-2steps.safetensors"
    assert files >= {"README.md", "settings.json", "sheet.png", comfyui, Path(FILE).name}
    assert sorted(path.name for path in (folder / "validation").iterdir()) == [
        "step-00000000-0.png", "step-00000001-0.png", "step-00000002-0.png", "teacher-0.png"
    ]  # fmt: skip
    for name in (Path(FILE).name, comfyui):
        with safe_open(folder / "lora" / name, "pt") as file:
            facts = json.loads(file.metadata()["distilled"])
            assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
        assert (facts["steps"], facts["teacher_guidance"], facts["guidance_scale"]) == (2, 4.0, 1.0)
        assert (facts["shift"], facts["times"]) == (1.0, [1.0, 0.5, 0.0])
    card = (folder / "lora" / "README.md").read_text(encoding="utf-8")
    assert "num_inference_steps=2, guidance_scale=1" in card and "cfg 1.0" in card
    for path in folder.glob("lora/**/*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_a_student_of_all_weights_is_a_model_folder_that_is_no_base(distill, prompts, tmp_path, capsys):
    assert distill("out", "--rank", "0", "--max-steps", "1") == 0
    model = tmp_path / "out" / "model"
    pipe = PTDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a star", num_inference_steps=2, guidance_scale=1, output_type="latent").images.isfinite().all()
    assert run(model, prompts, tmp_path / "again") == 2
    assert "is distilled itself" in capsys.readouterr().err.splitlines()[-1]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance", "0"], "guidance=0.0 must be at least 1; nearest: 1"),
        (["--steps", "0"], "steps=0 must be at least 1; nearest: 1"),
        (["--steps", "3"], "points=4 is not a multiple of steps=3; nearest: 3"),
        (["--teacher-steps", "6"], "teacher_steps=6 is not a multiple of points=4; nearest: 4"),
        (["--held-out", "5"], "held_out=5 leaves none of paths=5; nearest: 4"),
        (["--stage", "segment"], "stage='segment' must be one of paths, segments, tdm; nearest: 'segments'"),
        (["--stage", "tdm", "--rank", "0"], "rank=0 has no adapter, which stage tdm needs"),
        (["--stage", "tdm", "--start", "nowhere"], "start 'nowhere' holds no student"),
        (["--start", "nowhere"], "start 'nowhere' holds no student"),
        (["--start", "x", "--rank", "0"], "start='x' is an adapter, which rank=0 does not train"),
        (["--inner", "1.5"], "inner=1.5 must be at most 1; nearest: 1"),
        (["--resolution", "70"], "resolution=70 is not a multiple of 16; nearest: 64 or 80"),
        (["--prompts", "nowhere"], "prompts 'nowhere' is no file; give one with a caption per line"),
        (["--targets", "attn7"], "targets: 'attn7' is no linear layer"),
        (["--rank", "0", "--base-weights", "fp8"], "rank=0 trains the base weights"),
        (["--max-train-steps", "7"], "unrecognized arguments: --max-train-steps"),
        (["--config", "48gb"], "presets: 12gb, 24gb, shapes-4steps"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_long_work(distill, tmp_path, capsys, flags, words):
    assert distill("out", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and lines[-1].startswith("distill: ")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("transformer/config.json", '"round_timestep": false', '"round_timestep": true', "round_timestep: true"),
        ("transformer/config.json", '"proxy_mode": "mean"', '"proxy_mode": "random"', "proxy_mode: random"),
        (
            "scheduler/scheduler_config.json",
            '"shift_terminal": null',
            '"shift_terminal": 0.2',
            "samples 2 steps at the",
        ),
        ("scheduler/scheduler_config.json", '"stochastic_sampling": false', '"stochastic_sampling": true', "no paths"),
    ],
    ids=["round_timestep", "proxy_mode", "shift_terminal", "stochastic"],
)
def test_a_base_that_has_no_paths_is_refused(prompts, tiny_model_folder, tmp_path, capsys, file, old, new, words):
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    text = (other / file).read_text(encoding="utf-8")
    assert old in text
    (other / file).write_text(text.replace(old, new), encoding="utf-8")
    assert run(other, prompts, tmp_path / "out") == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(distill, capsys):
    assert distill("out", "--max-steps", "2") == 0
    assert distill("out", "--max-steps", "2") == 2
    assert "holds an earlier run" in capsys.readouterr().err.splitlines()[-1]
    assert distill("out", "--max-steps", "4", "--inner", "0.5", "--resume") == 2
    assert "inner was 0.0, is 0.5" in capsys.readouterr().err.splitlines()[-1]


def test_the_presets_are_settings_of_a_distillation():
    from lora.command_line import presets, read_config
    from ptdit_diffusers.training.settings import build

    for name in presets(DistillSettings):
        build(DistillSettings, read_config(name, DistillSettings) | {"output_dir": "x", "prompts": "y"}, name)


# --- use -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(distill, tmp_path) -> Path:
    assert distill("tiny-2steps", "--max-steps", "1") == 0
    return tmp_path / "tiny-2steps" / "lora"


def test_it_goes_on_from_a_student_and_refuses_one_that_does_not_fit(distill, student, tmp_path, capsys):
    assert distill("on", "--start", student, "--max-steps", "1", "--lr", "1e-12") == 0
    one, two = (load_file(folder / LORA_FILE) for folder in (student, tmp_path / "on" / "lora"))
    assert any(value.any() for key, value in one.items() if "lora_B" in key)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for flags, words in (
        (["--rank", "4"], "not 4; nearest: 2"),
        (["--targets", "attention"], "Nearest: the targets with which it was trained"),
        (["--stage", "tdm", "--steps", "4"], "is a student of 2 steps; nearest: steps=2"),
    ):
        assert distill("bad", "--start", student, *flags) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("form", ["folder", "comfyui"])
def test_guidance_and_another_size_meet_a_warning_where_a_distilled_lora_is_active(student, tiny_model_folder, form):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)

    def warned(guidance: float, **size: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe("a star", num_inference_steps=2, guidance_scale=guidance, output_type="latent", **size)
        return [str(each.message) for each in caught if "distilled" in str(each.message)]

    assert not warned(4)
    pipe.load_lora_weights(student if form == "folder" else student / "comfyui" / "tiny-2steps.safetensors")
    (line,) = warned(4)
    assert "distilled for 2 steps" in line and "guidance_scale=4 guides once more" in line
    assert not warned(1)
    (line,) = warned(1, width=96)
    assert "for num_frames=1, height=64, width=64, and may do worse at num_frames=1, height=64, width=96" in line
    pipe.disable_lora()
    assert not warned(4)
    pipe.enable_lora()
    assert warned(2)
    modular = PTDiTModularPipeline.from_pretrained(tiny_model_folder)
    modular.load_components()
    modular.update_components(transformer=pipe.transformer)
    modular.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="distilled for 2 steps"):
        modular(prompt="a star", num_inference_steps=1, output="latents")
    pipe.unload_lora_weights()
    assert not warned(4)


def test_both_forms_of_a_student_give_the_same_latents_with_the_stock_scheduler(student, tiny_model_folder):
    found = []
    for source in (student, student / "comfyui" / "tiny-2steps.safetensors"):
        pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "latent"}
        pipe.load_lora_weights(source)
        found.append(pipe("a star", generator=torch.Generator().manual_seed(0), **options).images)
    assert torch.equal(*found)


def test_the_command_uses_the_student_of_an_embedded_model(student, tiny_model_folder, tmp_path, monkeypatch, capsys):
    from ptdit_diffusers.cli import main as ptdit
    from ptdit_diffusers.commands import models
    from ptdit_diffusers.core import embedded, few_steps

    weights = tmp_path / "weights"
    shutil.copytree(tiny_model_folder, weights / "tiny")
    for module in (embedded, few_steps, models):
        monkeypatch.setattr(module, "WEIGHTS", weights)
    words = ["generate", "a red star", "--model", "tiny", "--turbo", "--output", str(tmp_path / "a.png")]
    assert ptdit(words) == 2
    assert "the model tiny has no LoRA of few steps in this package; models that have: none" in capsys.readouterr().err
    shutil.copytree(student, weights / "tiny-2steps")
    assert ptdit([*words, "--quantize", "int8"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert ptdit(words) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert {name: picture.text[name] for name in ("steps", "guidance", "turbo")} == {
            "steps": "2", "guidance": "1.0", "turbo": "tiny-2steps"
        }  # fmt: skip
    assert "distilled" not in capsys.readouterr().err
    assert ptdit([*words, "--guidance", "4", "--overwrite"]) == 0
    assert "was distilled for 2 steps" in capsys.readouterr().err
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    assert ptdit(["generate", "a red star", "--model", str(other), "--turbo"]) == 2
    assert "models that have: tiny" in capsys.readouterr().err
