"""The prepared run on a GPU: its rehearsal with tiny sizes, how it goes on, and the tables of the documentation."""

import json

import pytest

from scripts.benchmarks import gpu
from scripts.evaluation.records import read_record


@pytest.mark.slow
def test_every_part_is_rehearsed_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PRESETS", ("12gb",))
    parts = gpu.parts_of(True, "cpu", tmp_path / "model")
    found = {name: part.run() for name, part in parts.items()}
    json.dumps(found)
    assert {row["model"] for row in found["pictures, 32 px, eager"]} == set(gpu.MODELS) - {"wan"}
    assert {row["model"] for row in found["video, 2 latent frames, eager"]} == {"bare", "ptdit", "fused", "wan"}
    for name in ("no option", "--offload group", "--quantize fp8"):
        (row,) = found[f"official size: {name}"]
        assert row["host_gb"] > 0 and all(row[key] >= 0 for key in gpu.gpu_parts.TIMES)
    assert found["LoRA: 12gb"][0]["loss_is_finite"]
    assert "seconds per forward" in gpu.tables({"parts": {name: {"status": "done", "rows": rows} for name, rows in
                                                          found.items()}})  # fmt: skip


def test_a_run_goes_on_where_it_was_stopped_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    answers = {"a": "done", "b": "out of memory", "c": "done"}
    asked = []

    def run_part(name, words, limit):
        asked.append(name)
        return {"status": answers[name], "date": "", "seconds": 1.0, "rows": []}

    monkeypatch.setattr(gpu, "parts_of", lambda *_: dict.fromkeys(answers, gpu.Part(9, list)))
    monkeypatch.setattr(gpu, "run_part", run_part)
    words = ["--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    assert gpu.main(words) == 1 and asked == ["a", "b", "c"]
    answers["b"] = "done"
    assert gpu.main(words) == 0 and asked == ["a", "b", "c", "b"]
    assert "b: out of memory, 1.0 s" in capsys.readouterr().out
    assert gpu.main([*words[:-1], str(tmp_path / "other.json"), "--minutes", "0"]) == 1
    assert "no time left" in capsys.readouterr().out and len(asked) == 4


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; open(sys.argv[-1], 'w').write('[1]')", "done"),
        ("raise SystemExit('lora: there is no x')", "failed: lora: there is no x"),
        ("raise RuntimeError('torch.OutOfMemoryError: CUDA out of memory')", "out of memory"),
        ("import time; time.sleep(60)", "out of time"),
    ],
)
def test_a_part_that_fails_says_how(monkeypatch, code, status):
    run = gpu.subprocess.run
    monkeypatch.setattr(gpu.subprocess, "run", lambda words, **how: run([words[0], "-c", code, *words[3:]], **how))
    found = gpu.run_part("a", [], 5)
    assert found["status"] == status and found["rows"] == ([1] if status == "done" else [])


def test_the_tables_of_the_documentation_are_those_of_the_record():
    written = gpu.PAGE.read_text(encoding="utf-8").partition(gpu.MARK)[2].lstrip("\n")
    assert written == gpu.tables(read_record(gpu.RESULTS, {}))


def test_what_was_measured_stands_in_the_tables():
    row = {"model": "ptdit", "median_s": 0.01234}
    official = {"gpu_gb": 11.1, "host_gb": 2.2, "load_s": 3.3, "step_s": 0.44, "decode_s": 0.55}
    record = {
        "hardware": {"device": "GPU", "torch": "2", "diffusers": "1"},
        "parts": {
            "pictures, 1024 px, compiled": {"status": "done", "rows": [row]},
            "pictures, 2048 px, eager": {"status": "out of memory", "rows": []},
            "official size: --offload group": {"status": "done", "rows": [official]},
        },
    }
    drawn = gpu.tables(record)
    assert "| pictures, 1024 px, compiled |  | 0.0123 |" in drawn
    assert "| pictures, 2048 px, eager | out of memory |" in drawn and "| not measured |" in drawn
    assert "| --offload group | 11.1 GB | 2.2 GB | 3.3 s | 0.44 s | 0.55 s |" in drawn
