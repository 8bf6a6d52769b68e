"""`ptdit quantize`: options, files and refusals; the formats themselves are tested in `conversion`."""

import json

import pytest

from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion import quantize as conversion


def test_the_command_writes_a_folder_with_the_index_of_the_original_and_refuses_in_one_line(
    tiny_model_folder, tmp_path, capsys
):
    words = ["quantize", str(tiny_model_folder), "--output", str(tmp_path / "fp8"), "--format", "fp8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "transformer: " in out and "text encoder: " in out and out.endswith(f"saved {tmp_path / 'fp8'}\n")
    one, other = ((folder / "model_index.json").read_text() for folder in (tiny_model_folder, tmp_path / "fp8"))
    assert json.loads(one) == json.loads(other)
    assert main(words) == 2
    assert "exists; name another folder" in (errors := capsys.readouterr().err) and errors.count("\n") == 1
    assert main([*words, "--overwrite", "--components", "transformer"]) == 0
    assert "text encoder" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "--output", "OUT"], "required: --format"),
        (["MODEL", "--output", "OUT", "--format", "q3_k"], "invalid choice: 'q3_k'"),
        (["MODEL", "--output", "OUT", "--format", "fp8", "--components", "vae"], "invalid choice: 'vae'"),
        (["missing", "--output", "OUT", "--format", "fp8"], "no model folder"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_line(words, message, tiny_model_folder, tmp_path, capsys):
    places = {"MODEL": str(tiny_model_folder), "OUT": str(tmp_path / "out")}
    assert main(["quantize", *(places.get(word, word) for word in words)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_reported(tiny_model_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_component", full)
    words = ["quantize", str(tiny_model_folder), "--output", str(tmp_path / "out"), "--format", "fp8"]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("cannot be written: No space left on device; nothing was kept\n")
    assert not list(tmp_path.iterdir())
