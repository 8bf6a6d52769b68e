"""The benchmark of few steps: forwards are counted, the reference is itself, finished rows are kept, bad input."""

import json
from pathlib import Path

import pytest
import torch

from lora.export import write_lora
from scripts.benchmarks import few_steps
from scripts.benchmarks.few_steps import all_rows, find_students, main
from tests.processes import run

REFERENCE = "teacher, euler, guidance 4, 2 steps"


@pytest.fixture
def student(tmp_path) -> Path:
    """A LoRA that says it was distilled, with random weights."""
    layer, generator = "transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    weights = {f"{layer}.lora_A.weight": torch.randn(2, 48, generator=generator)}
    weights[f"{layer}.lora_B.weight"] = torch.randn(48, 2, generator=generator)
    folder = tmp_path / "mine" / "lora"
    folder.mkdir(parents=True)
    write_lora(folder, "mine", weights, {}, "tiny", {"distilled": json.dumps({"steps": 2})})
    return folder


@pytest.fixture
def few_rows(monkeypatch):
    for name, value in {
        "TEACHER_STEPS": (2,), "STUDENT_STEPS": (1,), "GUIDANCES": (4.0,), "CACHES": {}, "REFERENCE": REFERENCE
    }.items():  # fmt: skip
        monkeypatch.setattr(few_steps, name, value)


def test_rows_count_forwards_and_the_reference_is_itself(
    few_rows, student, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "results" / "few.json"
    sizes = ["--prompts", "2", "--batch", "2", "--diversity-prompts", "1", "--diversity-seeds", "3"]
    words = ["--model", str(tiny_model_folder), "--student", str(student), "--output", str(output), *sizes]
    assert main(words) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert {name: row["forwards"] for name, row in rows.items()} == {
        REFERENCE: 4, "teacher, unipc, guidance 4, 2 steps": 4, "mine, euler, guidance 1, 1 steps": 1
    }  # fmt: skip
    assert rows[REFERENCE]["relative_error"] == 0 < rows["mine, euler, guidance 1, 1 steps"]["relative_error"]
    assert rows[REFERENCE]["table"]["everything right"]["asked"] == 2
    assert rows[REFERENCE]["spread"]["latents"] > 0
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| mine, euler, guidance 1, 1 steps | 1 |" in capsys.readouterr().out
    kept, name = json.loads(output.read_text(encoding="utf-8")), "mine, euler, guidance 1, 1 steps"
    row = kept["rows"].pop(name)
    output.write_text(json.dumps(kept), encoding="utf-8")
    (output.with_suffix(".latents") / "reference.safetensors").unlink()  # as on another machine
    assert main([*words, "--seconds"]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["rows"][name]["relative_error"] == row["relative_error"]
    assert record["seconds"].keys() == record["rows"].keys() and record["seconds_processor"]
    assert all(min(each.values()) > 0 for each in record["seconds"].values())
    assert f"{sum(record['seconds'][name].values()):.2f} |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--model", str(tiny_model_folder), "--output", str(output), *sizes, "--seconds"])
    assert "also of mine; name it with --student" in capsys.readouterr().err
    monkeypatch.setattr(few_steps, "Bench", None)  # nothing is made again
    assert main(words) == 0
    with pytest.raises(SystemExit):
        main([*words, "--seed", "1"])
    assert "holds results of other settings" in capsys.readouterr().err


def test_the_rows_are_those_of_the_table():
    names = [row.name for row in all_rows(["one", "two"])]
    assert names[0] == few_steps.REFERENCE and len(names) == len(set(names)) == 24 + 2 + 12
    assert {"teacher, unipc, guidance 2, 6 steps", "two, euler, guidance 1, 8 steps"} <= set(names)


def test_students_are_named_by_their_run_and_what_is_none_is_refused(student, tiny_model_folder, tmp_path):
    assert find_students([str(student), f"x={student}"]) == {"mine": student, "x": student}
    for folder in (tmp_path, tiny_model_folder):
        with pytest.raises(ValueError, match="holds no student; give the folder `lora` or `model` of a run"):
            find_students([str(folder)])


@pytest.mark.slow
def test_memory_of_a_distillation_is_measured_stage_by_stage(tmp_path):
    output = tmp_path / "memory.json"
    sizes = ["--layers", "1", "--resolution", "128", "--rank", "2"]
    done = run(["-m", "scripts.benchmarks.distill_memory", *sizes, "--output", output])
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text(encoding="utf-8"))
    assert found["loss_is_finite"] and set(found["stages"]) == {"paths", "segments", "tdm"}
    assert all(stage["peak_memory_gib"] > 0.1 for stage in found["stages"].values())
