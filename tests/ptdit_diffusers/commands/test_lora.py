"""`ptdit lora`: which module is launched, that every option goes on to it, and one line for what is missing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ptdit_diffusers.cli import main
from ptdit_diffusers.commands import lora
from ptdit_diffusers.training import processes

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
    monkeypatch.syspath_prepend(str(ROOT))  # so that what the command adds is taken back
    installed.add(module.removesuffix(".train"))
    monkeypatch.setattr(processes, "needs_launcher", lambda: False)
    training = SimpleNamespace(main=lambda words: called.append(words) or 7)
    monkeypatch.setattr(lora, "import_module", lambda name: training if name == module else None)
    words = ["--config", "x.yaml", "--rank", "3", "--flip", "--help"]
    with pytest.raises(SystemExit) as ended:
        main(["lora", *words])
    assert ended.value.code == 7
    assert called == [words]
    monkeypatch.setattr(processes, "needs_launcher", lambda: True)
    monkeypatch.setattr(lora, "launch", lambda name, words: called.append((name, words)) or 2)
    with pytest.raises(SystemExit) as ended:
        main(["lora", *words])
    assert ended.value.code == 2
    assert called[1:] == [(module, words)]


def test_without_the_package_and_outside_a_clone_it_says_where_to_run(monkeypatch, tmp_path, capsys, installed):
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "--rank", "3"]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err


def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, installed):
    monkeypatch.chdir(ROOT)
    installed.clear()
    assert main(["lora", "--rank", "3"]) == 2
    assert "training needs matplotlib: pip install '.[train]' in a clone of the repository" in capsys.readouterr().err
