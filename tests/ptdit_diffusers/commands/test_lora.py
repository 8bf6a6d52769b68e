"""`ptdit lora`: every word goes on to the training, and outside a clone one line says what is missing."""

import subprocess
import sys
from pathlib import Path

from ptdit_diffusers.cli import main

ROOT = Path(__file__).resolve().parents[3]


def test_all_options_go_to_the_training_and_its_exit_code_comes_back(monkeypatch):
    called = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "call", lambda words: called.append(words) or 7)
    try:
        main(["lora", "--config", "x.yaml", "--rank", "3", "--flip", "--help"])
    except SystemExit as ended:
        assert ended.code == 7
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "lora.train"]
    assert called == [[*launch, "--config", "x.yaml", "--rank", "3", "--flip", "--help"]]


def test_outside_a_clone_it_says_where_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "--rank", "3"]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err
