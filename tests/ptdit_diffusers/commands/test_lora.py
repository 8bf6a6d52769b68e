"""`ptdit lora`: which module is launched, that every option goes on to it, and one line for what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptdit_diffusers.cli import main
from ptdit_diffusers.commands import lora

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """What can be imported, as the command sees it."""
    names = {"matplotlib"}
    monkeypatch.setattr(lora, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.mark.parametrize("module", ["lora.train", "ptdit_diffusers.lora.train"], ids=["in a clone", "installed"])
def test_all_options_go_to_the_training_and_its_exit_code_comes_back(monkeypatch, tmp_path, installed, module):
    called = []
    monkeypatch.chdir(ROOT if module == "lora.train" else tmp_path)
    installed.add(module.removesuffix(".train"))
    monkeypatch.setattr(subprocess, "call", lambda words: called.append(words) or 7)
    with pytest.raises(SystemExit) as ended:
        main(["lora", "--config", "x.yaml", "--rank", "3", "--flip", "--help"])
    assert ended.value.code == 7
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "-m", module]
    assert called == [[*launch, "--config", "x.yaml", "--rank", "3", "--flip", "--help"]]


def test_without_the_package_and_outside_a_clone_it_says_where_to_run(monkeypatch, tmp_path, capsys, installed):
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "--rank", "3"]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err


def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, installed):
    monkeypatch.chdir(ROOT)
    installed.clear()
    assert main(["lora", "--rank", "3"]) == 2
    assert "training needs matplotlib: pip install '.[train]' in a clone of the repository" in capsys.readouterr().err
