"""Every code block of the README is run or checked, so that the README cannot promise what does not work."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.processes import run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGE_DESCRIPTION = 0x010E  # field of EXIF that holds the settings of a WebP
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Characters that mean something different, or nothing, in one of bash, zsh, cmd and PowerShell.
UNEQUAL_IN_SHELLS = set("'`$%^\\;|<>*?!~()@#{}")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[list[str]]:
    """The commands of all shell blocks, as lists of words."""
    lines = [line for text in blocks("sh") for line in text.splitlines()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_every_block_has_a_language_that_these_tests_know():
    assert len(BLOCKS) * 2 == TEXT.count("\n```")
    assert {language for language, _ in BLOCKS} <= {"sh", "python", "text"}
    assert len(blocks("sh")) >= 2 and len(blocks("python")) >= 1


def test_the_first_two_shell_blocks_are_the_two_commands_of_one_line_each():
    first, second = blocks("sh")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert "pip install" in first and "ptdit generate" in first
    assert "pip install" in second and "python -m pytest" in second


@pytest.mark.parametrize("block", blocks("sh"))
def test_a_shell_block_means_the_same_in_every_shell(block):
    assert not UNEQUAL_IN_SHELLS & set(block)


def test_every_command_is_one_that_these_tests_check():
    for words in commands():
        assert words[:3] == ["python", "-m", "pip"] or words[:3] == ["python", "-m", "pytest"] or words[0] == "ptdit"


def test_pip_commands_name_a_constraints_file_and_extras_that_exist():
    installs = [words for words in commands() if words[:4] == ["python", "-m", "pip", "install"]]
    assert installs
    for *_, option, constraints, target in installs:
        assert option == "-c" and (ROOT / constraints).is_file()
        name, _, extras = target.partition("[")
        assert name == "."
        assert set(extras.rstrip("]").split(",")) - {""} <= set(PROJECT["optional-dependencies"])


def test_the_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    needed = [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]
    assert {re.match(r"[\w-]+", each)[0] for each in needed} <= pinned


def test_pytest_finds_the_tests_without_arguments():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert all((ROOT / folder).is_dir() for folder in options["testpaths"])


PTDIT = [words for words in commands() if words[0] == "ptdit"]


@pytest.mark.slow
@pytest.mark.parametrize("words", PTDIT, ids=shlex.join)
def test_a_ptdit_command_makes_the_picture_it_names(words, tmp_path):
    """The first command as it stands; the others, which differ in model and output, in fewer steps."""
    from PIL import Image

    assert PROJECT["scripts"]["ptdit"] == "ptdit_diffusers.cli:main"
    line = ["-m", "ptdit_diffusers.cli", *words[1:]]
    done = run(line, tmp_path, real=True) if words == PTDIT[0] else run([*line, "--steps", "3"], tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / words[words.index("--output") + 1]) as picture:
        assert min(picture.size) >= 128 and getattr(picture, "n_frames", 1) == (17 if "--num-frames" in words else 1)
        facts = picture.text if picture.format == "PNG" else json.loads(picture.getexif()[IMAGE_DESCRIPTION])
        assert facts["prompt"] == words[2]


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs_and_writes_the_files_it_names(code, tmp_path):
    done = run(["-W", "error::DeprecationWarning:__main__", "-c", code], tmp_path, real=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r'\.save\("([^"]+)"\)', code)
    assert named and sorted(os.listdir(tmp_path)) == sorted(named)


def test_the_file_tree_names_files_that_exist():
    (tree,) = blocks("text")
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [line.split()[0]]
        assert Path(ROOT, *parents).exists(), line


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", TEXT)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_options_in_the_readme_are_those_of_the_command():
    from ptdit_diffusers.cli import build_parser

    generate = build_parser()._subparsers._group_actions[0].choices["generate"]
    known = {option for action in generate._actions for option in action.option_strings}
    section = TEXT[TEXT.index("### The command") : TEXT.index("## Will it run")]
    named = set(re.findall(r"`(--[\w-]+)`", section))
    assert named == known - {"-h", "--help"}


def test_the_readme_is_short_and_finished():
    assert TEXT.count("\n") <= 200
    assert "<!--" not in TEXT
