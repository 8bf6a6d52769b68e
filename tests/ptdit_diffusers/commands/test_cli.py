"""The command `ptdit`, run on a tiny model of the real classes with random weights."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image, PngImagePlugin

from ptdit_diffusers import __version__
from ptdit_diffusers.cli import main
from ptdit_diffusers.commands.generate import choose_device, choose_dtype
from ptdit_diffusers.commands.outputs import output_files
from ptdit_diffusers.commands.terminal import UserError, number, pixels
from tests.processes import run, start, wait

PROMPT = "two small green stars above a purple ring, white background"


@pytest.fixture
def generate(tiny_model_folder, tmp_path):
    """Runs `ptdit generate` with the tiny model in two steps, into tmp_path/a.png if nothing else is said."""

    def run(*words: str, prompt: str = PROMPT) -> int:
        fixed = ["--model", str(tiny_model_folder), "--steps", "2", "--output", str(tmp_path / "a.png")]
        fixed += ["--device", "cpu"]  # so that numbers and messages are the same on every machine
        return main(["generate", prompt, *fixed, *words])  # of an option that is given twice the last one counts

    return run


def shell(*words: str, cwd: Path, **variables: str) -> CompletedProcess:
    """Run the command in a new interpreter, as the console script does."""
    return run(["-m", "ptdit_diffusers.cli", *words], cwd, real=True, **variables)


def metadata_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return dict(image.text)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_picture_of_the_models_own_size(generate, tmp_path, capsys):
    assert generate() == 0
    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
    assert os.listdir(tmp_path) == ["a.png"]
    assert "saved" in capsys.readouterr().out


def test_the_command_says_which_device_and_number_format_it_chose_and_why(generate, capsys):
    assert generate("--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "device: cpu (as asked)" in out
    assert "dtype: fp32 (auto: the safe choice on cpu)" in out


def test_the_picture_carries_what_made_it(generate, tmp_path):
    import diffusers
    import torch

    assert generate("--seed", "7", "--guidance", "2.5", "--negative-prompt", "red heart", "--height", "32") == 0
    metadata = metadata_of(tmp_path / "a.png")
    assert metadata["prompt"] == PROMPT
    assert metadata["negative_prompt"] == "red heart"
    assert (metadata["seed"], metadata["steps"], metadata["guidance"]) == ("7", "2", "2.5")
    assert (metadata["height"], metadata["width"]) == ("32", "64")
    assert (metadata["device"], metadata["dtype"]) == ("cpu", "fp32")
    assert metadata["ptdit"] == __version__
    assert (metadata["diffusers"], metadata["torch"]) == (diffusers.__version__, torch.__version__)


def test_each_of_several_pictures_can_be_made_alone_from_its_own_seed(generate, tmp_path):
    assert generate("--num-images", "3", "--seed", "5") == 0
    assert sorted(os.listdir(tmp_path)) == ["a-0.png", "a-1.png", "a-2.png"]
    assert metadata_of(tmp_path / "a-2.png")["seed"] == "7"
    assert generate("--seed", "7", "--output", str(tmp_path / "alone.png")) == 0
    with Image.open(tmp_path / "a-2.png") as one, Image.open(tmp_path / "alone.png") as other:
        differences = [abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)]
    assert max(differences) <= 1  # a batch may round differently, by one level of 255


def test_two_seeds_give_two_pictures(generate, tmp_path):
    assert generate("--num-images", "2") == 0
    assert (tmp_path / "a-0.png").read_bytes() != (tmp_path / "a-1.png").read_bytes()
    with Image.open(tmp_path / "a-0.png") as one, Image.open(tmp_path / "a-1.png") as other:
        assert one.tobytes() != other.tobytes()


def test_many_large_pictures_are_made_in_several_calls(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("ptdit_diffusers.commands.generate.PIXELS_PER_CALL", 2 * 64 * 64)
    assert generate("--num-images", "3") == 0
    assert len(os.listdir(tmp_path)) == 3


def test_a_prompt_in_any_script_reaches_the_settings(generate, tmp_path):
    assert generate(prompt="a red circle 红色") == 0  # cleaning deletes Chinese text, the settings keep it
    assert metadata_of(tmp_path / "a.png")["prompt"] == "a red circle 红色"


def test_half_precision_is_used_when_asked_for(generate, tmp_path, capsys):
    assert generate("--dtype", "bf16", "--device", "cpu") == 0
    assert "dtype: bf16 (as asked)" in capsys.readouterr().out
    assert metadata_of(tmp_path / "a.png")["dtype"] == "bf16"


def test_overwrite_replaces_a_file_and_a_new_file_has_ordinary_permissions(generate, tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "ordinary").touch()
    assert generate("--overwrite") == 0
    assert metadata_of(tmp_path / "a.png")["prompt"] == PROMPT
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "an empty prompt": ((), "", "the prompt is empty"),
    "a prompt of spaces": ((), "  ", "the prompt is empty"),
    "an unknown word": ((), "a red sircle", "'sircle' (nearest: circle"),
    "two unknown words": ((), "a gren hart", "'gren' (nearest: green"),
    "an unknown word to avoid": (("--negative-prompt", "bleu"), PROMPT, "'bleu' (nearest: blue"),
    "nothing but brackets": ((), "[[(())]]", "nothing is left of the prompt"),
    "an absurd size": (("--height", "65536", "--width", "65536"), PROMPT, "TiB of memory, of "),
    "absurdly many pictures": (("--num-images", str(10**12)), PROMPT, "years; nearest: --num-images "),
    "more pictures than a float can count": (("--num-images", str(10**400)), PROMPT, f"nearest: {2**63 - 1}"),
    "an absurdly long video": (("--num-frames", "1000001", "--output", "a.webp"), PROMPT, "nearest: --num-frames "),
    "absurdly many views": (("--num-views", "1000001"), PROMPT, "nearest: --num-views "),
    "absurdly many steps": (("--steps", str(10**12)), PROMPT, "nearest: --steps "),
    "a height between legal sizes": (("--height", "100"), PROMPT, "nearest: 96 or 112"),
    "a width of zero": (("--width", "0"), PROMPT, "nearest: 16"),
    "a size in words": (("--width", "big"), PROMPT, "'big' is not a whole number"),
    "no steps": (("--steps", "0"), PROMPT, "nearest: 1"),
    "negative steps": (("--steps", "-3"), PROMPT, "nearest: 1"),
    "no pictures": (("--num-images", "0"), PROMPT, "nearest: 1"),
    "a negative seed": (("--seed", "-1"), PROMPT, "nearest: 0"),
    "a seed that is too large": (("--seed", str(2**63)), PROMPT, f"nearest: {2**63 - 1}"),
    "a last seed that is too large": (("--seed", str(2**63 - 1), "--num-images", "2"), PROMPT, f"{2**63 - 2}"),
    "a guidance that is no number": (("--guidance", "nan"), PROMPT, "--guidance"),
    "an infinite guidance": (("--guidance", "inf"), PROMPT, "--guidance"),
    "an unknown dtype": (("--dtype", "int4"), PROMPT, "--dtype"),
    "an unknown option": (("--stpes", "3"), PROMPT, "--stpes"),
    "a file that is not PNG": (("--output", "a.jpg"), PROMPT, ".png"),
    "an empty output": (("--output", ""), PROMPT, ".png"),
    "a missing output folder": (("--output", "no/such/a.png"), PROMPT, "there is no folder"),
    "an output name that is too long": (("--output", "a" * 300 + ".png"), PROMPT, "cannot be written"),
    "a missing model folder": (("--model", "./no/such/model"), PROMPT, "'./no/such/model' is not a folder"),
    "an empty model name": (("--model", ""), PROMPT, "--model ''"),
    "a misspelled model name": (("--model", "shaeps-128"), PROMPT, "'shaeps-128' is not a folder"),
    "a Hub id without a network": (
        ("--model", "no-such-owner/no-such-model"),
        PROMPT,
        "cannot be downloaded from the Hub: no-such-owner/no-such-model was not fetched yet, and the Hub cannot be "
        "reached (offline mode, or no network)",
    ),
}


def test_a_device_that_is_not_there_is_refused(generate, capsys):
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in (name for name, present in there.items() if not present):
        assert generate("--device", name) == 2
        assert f"--device {name}" in capsys.readouterr().err


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(case, generate, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, prompt, expected = BAD_INPUT[case]
    assert generate(*words, prompt=prompt) == 2
    streams = capsys.readouterr()
    assert expected in streams.err
    assert streams.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_yes_tries_what_the_estimate_refuses(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptdit_diffusers.pipelines.machine.memory_of", lambda device: 2 * 10**5)
    assert generate() == 2
    assert "nearest: --height 16 --width 16; --yes tries it" in capsys.readouterr().err
    assert generate("--yes") == 0 and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("words", [(), ("generate",), ("paint", "a star")])
def test_a_command_that_is_not_whole_is_one_line_with_exit_code_2(words, capsys):
    assert main(list(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_exists_is_refused_and_kept(generate, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"mine")
    assert generate() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"mine"


def test_one_existing_file_among_several_targets_stops_the_command_before_it_starts(generate, tmp_path):
    (tmp_path / "a-1.png").write_bytes(b"mine")
    assert generate("--num-images", "2") == 2
    assert os.listdir(tmp_path) == ["a-1.png"]
    assert generate("--num-images", "1000000") == 2  # found by what is there, without a list of all names


def test_a_folder_as_output_is_refused_even_with_overwrite(generate, tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    assert generate("--overwrite") == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission_is_refused(generate, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert generate("--output", str(locked / "a.png")) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_folder_that_takes_no_files_is_refused(generate, capsys):
    assert generate("--output", "/proc/self/a.png") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused(generate, capsys):
    assert generate(prompt="a red \udcff circle") == 2
    assert "not text" in capsys.readouterr().err


# --- damaged model folders -------------------------------------------------------------------------------------------


def damage(folder: Path, kind: str) -> None:
    match kind:
        case "no index":
            (folder / "model_index.json").unlink()
        case "half an index":
            (folder / "model_index.json").write_text('{"_class_name": ')
        case "an index of another pipeline":
            (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        case "an index that is a list":
            (folder / "model_index.json").write_text("[]")
        case "a missing component":
            shutil.rmtree(folder / "vae")
        case "half a tokenizer":
            (folder / "tokenizer" / "tokenizer.json").write_text('{"model": ')
        case "missing weights":
            (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        case "half the weights":
            path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
            path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "kind",
    [
        "no index",
        "half an index",
        "an index of another pipeline",
        "an index that is a list",
        "a missing component",
        "half a tokenizer",
        "missing weights",
        "half the weights",
    ],
)
def test_a_damaged_model_folder_is_one_line_with_exit_code_2(kind, generate, tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    damage(folder, kind)
    assert generate("--model", str(folder)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_file_given_as_model_is_called_a_file(generate, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert generate("--model", str(tmp_path / "model.safetensors")) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_hub_model_in_the_cache_is_used_without_a_network(
    generate, tiny_model_folder, tmp_path, capsys, monkeypatch
):
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model_folder, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    assert generate("--model", "someone/tiny", "--steps", "1") == 0
    assert "downloading someone/tiny from the Hugging Face Hub" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


# --- conventions of a console program --------------------------------------------------------------------------------


def test_version_and_help_exit_with_0_and_name_the_command(tmp_path):
    version = shell("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"ptdit {__version__}\n")
    text = shell("generate", "--help", cwd=tmp_path)
    assert text.returncode == 0
    options = (
        "model output seed num-images height width steps guidance negative-prompt dtype device overwrite"
    ).split()
    assert all(f"--{option}" in text.stdout for option in options)


def test_help_and_mistakes_are_answered_without_loading_torch(tmp_path):
    code = (
        "import sys; from ptdit_diffusers.cli import main; "
        "assert main(['generate', '']) == 2; assert main(['generate', 'x', '--model', '/no']) == 2; "
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = run(["-c", code], tmp_path, real=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_results_go_to_stdout_and_the_progress_bar_to_stderr(tiny_model_folder, tmp_path):
    done = shell("generate", PROMPT, "--model", str(tiny_model_folder), "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr
    assert "warning" not in done.stderr.lower()
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["model:", "saved"]
    assert os.listdir(tmp_path) == ["ptdit.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT that can be sent to one process")
def test_ctrl_c_ends_with_one_line_and_exit_code_130_and_leaves_no_half_file(tiny_model_folder, tmp_path):
    words = ["generate", PROMPT, "--model", str(tiny_model_folder), "--steps", "100000", "--output", "a.png"]
    with start(["-m", "ptdit_diffusers.cli", *words], tmp_path, real=True, PYTHONUNBUFFERED="1") as running:
        while "\n" not in running.text("stdout") and running.returncode is None:
            time.sleep(0.01)
        time.sleep(0.5)  # the choices are reported; loading and sampling come next
        os.kill(running.pid, signal.SIGINT)
        (done,) = wait([running])
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith("ptdit: interrupted")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_terminal_that_cannot_show_a_letter_gets_it_escaped(tiny_model_folder, tmp_path):
    words = ["generate", "a rød star", "--model", str(tiny_model_folder)]
    done = shell(*words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "r\\xf8d" in done.stderr


# --- small parts -----------------------------------------------------------------------------------------------------


def test_numbers_out_of_range_name_the_nearest_legal_value():
    with pytest.raises(Exception, match="nearest: 9"):
        number(int, 1, 9)("12")
    assert number(float, 0)("2.5") == 2.5
    assert pixels("48") == 48


def test_several_pictures_get_numbered_names_beside_the_one_asked_for():
    assert [*output_files(Path("x/y.png"), 2)] == [Path("x/y-0.png"), Path("x/y-1.png")]
    assert [*output_files(Path("y.PNG"), 1)] == [Path("y.PNG")]


def test_device_and_dtype_are_taken_as_asked_or_refused():
    import torch

    assert choose_device("cpu").name == "cpu"
    assert choose_dtype("fp16", "cpu", Path()) == ("fp16", "as asked")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="usable: .*cpu"):
            choose_device("cuda")


@pytest.mark.gpu
def test_a_gpu_is_chosen_when_there_is_one(generate, capsys):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert generate() == 0
    assert "device: cuda (auto: a CUDA GPU was found)" in capsys.readouterr().out
