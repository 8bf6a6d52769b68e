"""Tests of what needs no ComfyUI around the nodes: import without it, version message, packaging."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_nodes import MINIMUM_VERSION, version_message

ROOT = Path(__file__).parents[2]
NODES = (
    "PTDiTFolderLoader",
    "PTDiTVAELoader",
    "PTDiTTextEncode",
    "PTDiTClass",
    "PTDiTEmptyLatent",
    "PTDiTWindowProxy",
    "PTDiTModelSampling",
    "PTDiTScheduler",
    "PTDiTClassGuidance",
    "PTDiTProxyMap",
    "PTDiTViewsToBatch",
    "PTDiTContactSheet",
)


def test_an_old_comfyui_gets_a_sentence_and_a_new_one_the_nodes():
    assert version_message("0.3.60") is None and version_message("0.33.0") is None and version_message("1.0.0") is None
    assert "0.3.60 or newer; this is 0.3.59" in version_message("0.3.59")


def test_the_root_file_does_nothing_where_comfyui_is_missing():
    code = "import importlib.util as u; s = u.spec_from_file_location('pack', '__init__.py'); " \
           "m = u.module_from_spec(s); s.loader.exec_module(m); assert not hasattr(m, 'WEB_DIRECTORY')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_nodes_reach_the_maths_without_diffusers():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('diffusers', 'transformers', 'accelerate', 'peft'):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import comfyui_nodes.windows, comfyui_nodes.sampling, comfyui_nodes.proxy_map\n"
        "import ptdit_diffusers.core.embedded, ptdit_diffusers.core.configuration\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "comfyui_nodes").glob("*.py")), ids=lambda path: path.name)
def test_every_name_that_the_nodes_import_from_the_core_is_there(path):
    """Without ComfyUI most of these files cannot be imported, so nothing else would notice here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptdit_diffusers."):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_help_and_both_languages(name):
    for language in ("", "zh"):
        page = ROOT / "comfyui_nodes/web/docs" / (f"{name}/{language}.md" if language else f"{name}.md")
        assert len(page.read_text(encoding="utf-8")) > 200
    english, chinese = (
        json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))[name]
        for language in ("en", "zh")
    )
    assert set(english["inputs"]) == set(chinese["inputs"]) and set(english["outputs"]) == set(chinese["outputs"])
    for words in (english, chinese):
        assert words["display_name"] and words["description"]
        assert all(each.get("tooltip") for each in words["inputs"].values())


def packed_files() -> list[str]:
    """What the registry's archive holds: files under version control that `.comfyignore` does not name."""
    ignored = [line.rstrip("/") for line in (ROOT / ".comfyignore").read_text().split()]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    return [file for file in listed if file and file not in ignored and file.split("/")[0] not in ignored]


def test_the_registry_gets_what_it_asks_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text[text.index("[tool.comfy]") :]
    for name in ("PublisherId", "DisplayName", "requires-comfyui"):
        assert f"{name} = " in table
    minimum = ".".join(map(str, MINIMUM_VERSION))
    assert f'requires-comfyui = ">={minimum}"' in table
    source = table.split("[tool.comfy.version]")[1].split('"')[1]
    assert "__version__ = " in (ROOT / source).read_text(encoding="utf-8")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") for line in lines), "the nodes must not install anything into ComfyUI"


def test_the_registry_gets_no_file_that_its_check_warns_about():
    files = packed_files()
    if not files:
        pytest.skip("this is no git checkout")
    assert {"__init__.py", "LICENSE", "pyproject.toml", "requirements.txt"} <= set(files)
    assert not {"tests", "docs", "scripts", "lora"} & {file.split("/")[0] for file in files}
    code = [file for file in files if file.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", "-q", "--isolated", "--select", "S102,S307,E702", *code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
