"""The rules of the house, checked on the source: who may import whom, sizes of files and functions, the wheel."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ptdit_diffusers", "comfyui_nodes", "lora", "scripts", "tests")
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.parts[0] == "ptdit_diffusers"]

FILE_LINES = 500
FUNCTION_LINES = 60  # without the docstring
TRAINING_MAIN_LINES = 150
WEIGHTS_BYTES = 40 * 1000**2  # of one model folder

# Beginning of a path -> what may be imported besides the standard library. The longest beginning counts.
# "ptdit_diffusers.models.ptdit_" allows every module whose full name begins so.
MAY_IMPORT = {
    "ptdit_diffusers/": ("diffusers", "transformers", "ptdit_diffusers."),
    "ptdit_diffusers/models/ptdit_": ("torch", "ptdit_diffusers.models.ptdit_"),
    "ptdit_diffusers/models/": ("torch", "diffusers", "ptdit_diffusers.models."),
    "ptdit_diffusers/pipelines/": (
        "torch",
        "numpy",
        "PIL",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "ftfy",
        "ptdit_diffusers.models.",
        "ptdit_diffusers.pipelines.",
        "ptdit_diffusers.registration",
    ),
    "ptdit_diffusers/pipelines/ptdit_embedded.py": (),
    "ptdit_diffusers/import_hook.py": (),
    "ptdit_diffusers/export/": (
        "torch",
        "PIL",
        "diffusers",
        "huggingface_hub",
        "safetensors",
        "ptdit_diffusers",
        "ptdit_diffusers.export.",
        "ptdit_diffusers.pipelines.",
    ),
    "ptdit_diffusers/registration.py": ("torch", "diffusers", "ptdit_diffusers."),
    "ptdit_diffusers/cli.py": ("ptdit_diffusers", "ptdit_diffusers.commands."),
    "ptdit_diffusers/commands/": (
        "torch",
        "PIL",
        "diffusers",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "ptdit_diffusers",
        "ptdit_diffusers.commands.",
        "ptdit_diffusers.conversion.",
        "ptdit_diffusers.export.",
        "ptdit_diffusers.pipelines.",
    ),
    "ptdit_diffusers/commands/terminal.py": (),
    "ptdit_diffusers/commands/outputs.py": (
        "numpy",
        "PIL",
        "imageio",
        "ptdit_diffusers.commands.terminal",
        "ptdit_diffusers.pipelines.ptdit_views",
    ),
    "ptdit_diffusers/conversion/": (
        "torch",
        "safetensors",
        "diffusers",
        "transformers",
        "ptdit_diffusers.models.",
        "ptdit_diffusers.conversion.",
    ),
    "ptdit_diffusers/conversion/keys.py": ("torch",),
    "ptdit_diffusers/conversion/hub.py": ("huggingface_hub", "ptdit_diffusers.conversion."),
    "ptdit_diffusers/conversion/quantize.py": (
        "torch",
        "diffusers",
        "transformers",
        "torchao",
        "gguf",
        "ptdit_diffusers.models.",
        "ptdit_diffusers.conversion.",
    ),
    "ptdit_diffusers/conversion/containers.py": ("torch", "safetensors", "ptdit_diffusers.conversion.keys"),
    # ComfyUI ships neither diffusers nor our other requirements: only what it has itself, and our pure parts.
    "comfyui_nodes/": (
        "torch",
        "comfy",
        "comfy_api",
        "comfyui_version",
        "folder_paths",
        "tokenizers",
        "ptdit_diffusers.models.ptdit_",
        "ptdit_diffusers.conversion.keys",
        "ptdit_diffusers.pipelines.ptdit_embedded",
        "ptdit_diffusers.pipelines.ptdit_sampling",
        "ptdit_diffusers.pipelines.ptdit_text",
        "ptdit_diffusers.pipelines.ptdit_views",
        "comfyui_nodes.",
    ),
    "comfyui_nodes/library.py": (),
    "comfyui_nodes/inference.py": ("torch", "ptdit_diffusers.models.ptdit_"),
    "comfyui_nodes/windows.py": ("ptdit_diffusers.models.ptdit_grid",),
    "comfyui_nodes/proxy_map.py": ("torch", "ptdit_diffusers.models.ptdit_grid"),
    "comfyui_nodes/sampling.py": ("torch", "ptdit_diffusers.pipelines.ptdit_sampling"),
    # Fine-tuning shares the small helpers of training, never its stages or the drawn world.
    "lora/": (
        "torch",
        "numpy",
        "PIL",
        "yaml",
        "av",
        "wandb",
        "bitsandbytes",
        "prodigyopt",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "peft",
        "safetensors",
        "ptdit_diffusers.",
        "lora.",
        "scripts.training.checkpoint",
        "scripts.training.config",
        "scripts.training.parts",
        "scripts.training.record",
        "scripts.training.stage",
    ),
    "scripts/teach_": ("torch", "numpy", "PIL", "ptdit_diffusers", "lora.train", "scripts."),
    "scripts/measure_lora.py": ("torch", "diffusers", "ptdit_diffusers.models.", "lora.", "scripts.training.record"),
    "scripts/": (
        "torch",
        "numpy",
        "scipy",
        "PIL",
        "yaml",
        "matplotlib",
        "accelerate",
        "diffusers",
        "transformers",
        "tokenizers",
        "safetensors",
        "tqdm",
        "ptdit_diffusers.",
        "scripts.",
    ),
    # The world and its judge know neither each other nor the model: the judge must not learn from what it judges.
    "scripts/drawn_world/": ("numpy", "PIL", "scripts.drawn_world."),
    "scripts/verifier/": ("numpy", "scipy", "PIL", "scripts.verifier."),
    "scripts/verifier/truth.py": ("numpy", "scipy", "PIL", "scripts.verifier.", "scripts.drawn_world."),
    # Views are judged by fitting the renderer to them; its captions stay unknown.
    "scripts/solid_world/": ("numpy", "scripts.drawn_world.", "scripts.solid_world."),
    "scripts/verifier/views_fit.py": (
        "numpy",
        "scipy",
        "PIL",
        "scripts.verifier.",
        "scripts.solid_world.objects",
        "scripts.solid_world.render",
    ),
    "scripts/verifier/sequences.py": (
        "numpy",
        "scipy",
        "scripts.verifier.",
        "scripts.drawn_world.",
        "scripts.solid_world",
    ),
    "scripts/verifier/views_judge.py": ("numpy", "scripts.verifier.", "scripts.solid_world.render"),
}
BLOCKED_FOR_BACKBONES = ("diffusers", "transformers", "huggingface_hub", "einops", "comfy")


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def is_project_module(name: str) -> bool:
    base = ROOT.joinpath(*name.split("."))
    return base.with_suffix(".py").is_file() or base.is_dir()


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it; relative imports are resolved."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[:-1][: len(path.parts) - node.level] if node.level else ())
            module = ".".join(part for part in (package, node.module) if part)
            for alias in node.names:  # `from package import module` imports the module
                full = f"{module}.{alias.name}"
                yield full if is_project_module(full) else module


def import_is_allowed(module: str, allowed: tuple[str, ...]) -> bool:
    """Whether a module is in the standard library or named by a rule: "x" means x, or x.y outside our project;
    "a.b." and "a.b_" mean every module whose name begins so, and the package a.b itself.
    """
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    ours = top in FOLDERS
    for rule in allowed:
        if rule[-1] in "._":
            if f"{module}.".startswith(rule):
                return True
        elif module == rule or (not ours and top == rule):
            return True
    return False


def rules_for(path: Path) -> tuple[str, ...]:
    beginnings = [beginning for beginning in MAY_IMPORT if path.as_posix().startswith(beginning)]
    return MAY_IMPORT[max(beginnings, key=len)]


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] != "tests"], ids=str)
def test_a_file_imports_only_what_its_place_allows(path):
    forbidden = {module for module in imported_modules(path) if not import_is_allowed(module, rules_for(path))}
    assert not forbidden, f"{path} may import {rules_for(path)} and the standard library"


def test_the_import_rule_sees_relative_nested_and_foreign_imports():
    backbone = ("torch", "ptdit_diffusers.models.ptdit_")
    assert import_is_allowed("torch.nn.functional", backbone)
    assert import_is_allowed("math", backbone)
    assert import_is_allowed("ptdit_diffusers.models.ptdit_backbone", backbone)
    assert not import_is_allowed("ptdit_diffusers.models.transformer_ptdit", backbone)
    assert not import_is_allowed("ptdit_diffusers", backbone)
    assert not import_is_allowed("diffusers", backbone)
    found = set(imported_modules(Path("ptdit_diffusers/commands/generate.py")))
    assert {"ptdit_diffusers.commands.terminal", "torch", "ptdit_diffusers"} <= found


@pytest.mark.parametrize("name", ["ptdit_backbone", "ptdit_vae_backbone"])
def test_a_backbone_can_be_imported_where_diffusers_and_comfy_are_missing(name):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {BLOCKED_FOR_BACKBONES}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import ptdit_diffusers.models.{name}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_its_command_loads_no_heavy_library():
    code = (
        "import sys, ptdit_diffusers, ptdit_diffusers.cli\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- words and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_package_never_prints(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_is_short_enough_to_be_read(path):
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_function_is_short_enough_to_be_read(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            training_main = node.name == "main" and path.as_posix().startswith(("scripts/train", "lora/train"))
            limit = TRAINING_MAIN_LINES if training_main else FUNCTION_LINES
            assert function_lines(node) <= limit, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] != "tests"], ids=str)
def test_a_public_function_says_the_types_of_its_arguments_and_result(path):
    tree = parse(path)
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body if isinstance(node, ast.FunctionDef)):
        if node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        assert not untyped and node.returns is not None, f"{path}:{node.lineno} {node.name} {untyped}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] != "tests"], ids=str)
def test_a_file_says_what_it_owns(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel, built offline from a copy of the tree so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("ptdit_diffusers-*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_its_licence_and_nothing_of_the_workshop(wheel):
    tops = {name.split("/")[0] for name in wheel}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops == {"ptdit_diffusers", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= set(wheel)


def test_the_wheel_holds_every_module_and_every_weight_of_the_package(wheel):
    modules = {path.as_posix() for path in PACKAGE}
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ptdit_diffusers/weights").rglob("*.*")}
    assert modules | weights <= set(wheel)


def model_folders() -> list[Path]:
    return sorted(path.parent for path in (ROOT / "ptdit_diffusers/weights").glob("*/model_index.json"))


def test_a_model_lies_in_the_package():
    assert "shapes-128" in [folder.name for folder in model_folders()]


@pytest.mark.parametrize("folder", model_folders(), ids=lambda folder: folder.name)
def test_an_embedded_model_is_small_documented_and_keeps_its_weights_as_safetensors(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= WEIGHTS_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3  # text encoder, VAE, transformer
    assert (folder / "README.md").is_file()
    for config in (path for path in files if path.name == "config.json"):  # no path of the machine that trained it
        assert not json.loads(config.read_text(encoding="utf-8")).get("_name_or_path"), config
