"""The rules of the house, checked on the source: who may import whom, sizes of files and functions, the wheel."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ptdit_diffusers.core.embedded import SAME

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ptdit_diffusers", "comfyui_nodes", "lora", "scripts", "tests")
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.parts[0] == "ptdit_diffusers"]
PROGRAMS = [path for path in SOURCES if path.parts[0] != "tests"]

FILE_LINES = 500
FUNCTION_LINES = 60  # without the docstring
TRAINING_MAIN_LINES = 150
WEIGHTS_BYTES = 40 * 1000**2  # of one model folder

# The floors of the house, lowest first. A file imports from its own folder and from lower floors, never upwards; a
# folder stands for what lies below it, too, unless that is named by itself. Folders on one floor are strangers.
FLOORS = (
    ("ptdit_diffusers/core/backbones",),
    ("ptdit_diffusers/core",),
    ("ptdit_diffusers/models", "comfyui_nodes"),
    ("ptdit_diffusers/pipelines", "ptdit_diffusers/conversion"),
    ("ptdit_diffusers/training",),
    ("ptdit_diffusers/import_hook.py",),
    ("ptdit_diffusers/__init__.py",),
    ("ptdit_diffusers/export",),
    ("lora",),
    ("ptdit_diffusers/commands",),
    ("ptdit_diffusers/cli.py",),
    ("scripts/datasets/shapes",),
    ("scripts/datasets/solids",),
    ("scripts/datasets/emoji",),
    ("scripts/datasets",),
    ("scripts/verifiers/pictures",),
    ("scripts/verifiers/clips", "scripts/verifiers/views", "scripts/verifiers/emoji"),
    ("scripts/verifiers",),
    ("scripts/evaluation",),
    ("scripts/embedded_models",),
    ("scripts/benchmarks", "scripts"),
)
# Beginning of a path -> what may be imported besides the standard library and what the floors allow: packages of
# others, and modules of ours where they are fewer than the floors allow. The longest beginning counts.
MAY_IMPORT = {
    "ptdit_diffusers/": ("ptdit_diffusers.",),
    # ComfyUI and plain torch use the core: nothing that either of them lacks.
    "ptdit_diffusers/core/": ("torch", "PIL", "ftfy", "ptdit_diffusers.core."),
    "ptdit_diffusers/core/backbones/": ("torch", "ptdit_diffusers.core.backbones."),
    "ptdit_diffusers/models/": ("torch", "diffusers", "ptdit_diffusers.core.", "ptdit_diffusers.models."),
    "ptdit_diffusers/pipelines/": (
        "torch",
        "numpy",
        "PIL",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "peft",
        "ptdit_diffusers.",
    ),
    "ptdit_diffusers/conversion/": (
        "torch",
        "safetensors",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "torchao",
        "gguf",
        "ptdit_diffusers.",
    ),
    "ptdit_diffusers/training/": (
        "torch",
        "numpy",
        "PIL",
        "yaml",
        "einops",
        "matplotlib",
        "bitsandbytes",
        "torchao",
        "trackio",
        "prodigyopt",
        "schedulefree",
        "safetensors",
        "accelerate",
        "filelock",
        "diffusers",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "peft",
        "av",
        "ptdit_diffusers.",
    ),
    "ptdit_diffusers/export/": (
        "torch",
        "PIL",
        "diffusers",
        "huggingface_hub",
        "safetensors",
        "ptdit_diffusers.",
    ),
    "ptdit_diffusers/commands/": (
        "torch",
        "numpy",
        "PIL",
        "imageio",
        "diffusers",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "ptdit_diffusers.",
    ),
    # ComfyUI ships neither diffusers nor our other requirements: only what it has itself, and our core.
    "comfyui_nodes/": (
        "torch",
        "comfy",
        "comfy_api",
        "comfyui_version",
        "folder_paths",
        "tokenizers",
        "ptdit_diffusers.core.",
        "comfyui_nodes.",
    ),
    "comfyui_nodes/library.py": (),
    "comfyui_nodes/labels.py": ("torch", "numpy", "PIL"),  # it draws text; ComfyUI itself requires both
    "lora/": (
        "torch",
        "numpy",
        "PIL",
        "yaml",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "peft",
        "safetensors",
        "ptdit_diffusers.",
        "lora.",
    ),
    "scripts/": (
        "torch",
        "numpy",
        "scipy",
        "PIL",
        "yaml",
        "einops",
        "matplotlib",
        "accelerate",
        "diffusers",
        "transformers",
        "tokenizers",
        "safetensors",
        "tqdm",
        "einops",
        "ptdit_diffusers.",
        "lora.train",
        "lora.distill",
        "lora.distill_config",
        "scripts.",
    ),
    # Data sets and verifiers know neither each other nor the model: a verifier shares no code with what it verifies.
    # They meet in the registry of the verifiers, where true samples check them.
    "scripts/datasets/": ("numpy", "einops", "PIL", "scripts.datasets."),
    "scripts/datasets/emoji/": ("numpy", "PIL", "resvg_py", "scripts.datasets.emoji."),
    "scripts/evaluation/": ("torch", "numpy", "einops", "PIL", "ptdit_diffusers.", "scripts.evaluation."),
    "scripts/verifiers/": ("numpy", "scipy", "einops", "PIL", "scripts.verifiers."),
    "scripts/verifiers/registry.py": ("numpy", "scripts.verifiers.", "scripts.datasets."),
    "scripts/verifiers/disturbances.py": ("numpy", "scipy", "PIL", "scripts.datasets.registry"),
    # Pictures of things have no rules that could be written down: their judges are networks, which see true pictures.
    "scripts/verifiers/emoji/": ("numpy", "torch", "safetensors", "scripts.verifiers.emoji."),
    # The one exception: views are verified by fitting the renderer to them; its captions stay unknown.
    "scripts/verifiers/views/": (
        "numpy",
        "scipy",
        "einops",
        "PIL",
        "scripts.verifiers.",
        "scripts.datasets.solids.objects",
        "scripts.datasets.solids.render",
    ),
}
MISSING_IN_COMFYUI = ("diffusers", "transformers", "huggingface_hub", "comfy")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def is_project_module(name: str) -> bool:
    base = ROOT.joinpath(*name.split("."))
    return base.with_suffix(".py").is_file() or base.is_dir()


@cache
def imported_modules(path: Path) -> tuple[str, ...]:
    """Full names of the modules that a file imports anywhere in it; relative imports are resolved."""
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[:-1][: len(path.parts) - node.level] if node.level else ())
            module = ".".join(part for part in (package, node.module) if part)
            for alias in node.names:  # `from package import module` imports the module
                full = f"{module}.{alias.name}"
                found.append(full if is_project_module(full) else module)
    return tuple(found)


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


def test_a_file_imports_only_what_its_place_allows():
    assert len(PROGRAMS) > 100
    for path in PROGRAMS:
        forbidden = {module for module in imported_modules(path) if not import_is_allowed(module, rules_for(path))}
        assert not forbidden, f"{path} may import {rules_for(path)} and the standard library"


def test_the_import_rule_sees_relative_nested_and_foreign_imports():
    backbone = ("torch", "ptdit_diffusers.core.backbones.")
    assert import_is_allowed("torch.nn.functional", backbone)
    assert import_is_allowed("math", backbone)
    assert import_is_allowed("ptdit_diffusers.core.backbones.ptdit", backbone)
    assert not import_is_allowed("ptdit_diffusers.models.transformer_ptdit", backbone)
    assert not import_is_allowed("ptdit_diffusers", backbone)
    assert not import_is_allowed("diffusers", backbone)
    found = set(imported_modules(Path("ptdit_diffusers/commands/generate.py")))
    assert {"ptdit_diffusers.commands.terminal", "torch", "ptdit_diffusers"} <= found


@cache
def floor_of(path: Path) -> int:
    """Number of the floor on which a file or folder lies; the longest name that fits counts."""
    fits = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if path == Path(name) or Path(name) in path.parents
    ]
    assert fits, f"{path} lies on no floor"
    return max(fits)[1]


@cache
def folder_on(path: Path) -> str:
    """The name in FLOORS that a file belongs to."""
    return max((n for names in FLOORS for n in names if path == Path(n) or Path(n) in path.parents), key=len)


def imported_files(path: Path) -> Iterator[Path]:
    """Files of ours that a file imports; a package is its __init__.py."""
    for module in imported_modules(path):
        if module.split(".")[0] in FOLDERS:
            target = Path(*module.split("."))
            yield target / "__init__.py" if (ROOT / target).is_dir() else target.with_suffix(".py")


def test_no_file_imports_from_a_higher_floor():
    for path in PROGRAMS:
        for target in imported_files(path):
            if folder_on(target) != folder_on(path):
                assert floor_of(target) < floor_of(path), f"{path} imports {target}"


def test_no_files_import_each_other_in_a_circle():
    """Inside a folder, too; imports inside functions count."""
    waiting = {path: set(imported_files(path)) - {path} for path in PROGRAMS}
    while free := [path for path, needs in waiting.items() if not needs & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert not waiting, f"in a circle, or above one: {sorted(map(str, waiting))}"


def test_the_core_can_be_imported_where_diffusers_and_comfy_are_missing():
    modules = [".".join(path.with_suffix("").parts) for path in PACKAGE if path.parts[1] == "core"]
    code = (
        "import importlib, sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {MISSING_IN_COMFYUI}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)"
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


def test_the_package_never_prints():
    for path in PACKAGE:
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not lines, path


def test_a_file_is_short_enough_to_be_read():
    for path in SOURCES:
        assert (ROOT / path).read_text(encoding="utf-8").count("\n") <= FILE_LINES, path


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def test_a_function_is_short_enough_to_be_read():
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                training_main = node.name == "main" and path.as_posix().startswith(("scripts/train", "lora/train"))
                limit = TRAINING_MAIN_LINES if training_main else FUNCTION_LINES
                assert function_lines(node) <= limit, f"{path}:{node.lineno} {node.name}"


def public_functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions of a file and methods of its classes."""
    tree = parse(path)
    for body in (tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))):
        yield from (node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))


def test_a_public_function_says_the_types_of_its_arguments_and_result():
    for path in PROGRAMS:
        for node in public_functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
            assert not untyped and node.returns is not None, f"{path}:{node.lineno} {node.name} {untyped}"


def test_a_file_says_what_it_owns():
    for path in PROGRAMS:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not text or ast.get_docstring(parse(path)), path


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the tree so that the tree stays clean."""
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
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> list[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel_file) as archive:
        return archive.namelist()


def test_the_package_index_takes_the_wheel(wheel_file):
    assert wheel_file.stat().st_size < 100e6  # its limit for a file


def test_the_wheel_holds_the_package_its_licence_and_nothing_of_the_workshop(wheel):
    tops = {name.split("/")[0] for name in wheel}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops == {"ptdit_diffusers", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= set(wheel)


def test_the_wheel_holds_every_module_and_every_weight_of_the_package(wheel):
    modules = {path.as_posix() for path in PACKAGE}
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ptdit_diffusers/weights").rglob("*.*")}
    of_nodes = {name for name in weights if "/comfyui/" in name}  # which come with the repository, not with the wheel
    assert of_nodes and modules | weights - of_nodes <= set(wheel) and of_nodes.isdisjoint(wheel)


def test_the_wheel_holds_lora_and_its_presets_as_a_part_of_the_package(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora").rglob("*.*") if path.suffix != ".pyc"}
    expected = {f"ptdit_diffusers/{name}" for name in files}
    assert {name for name in wheel if name.startswith("ptdit_diffusers/lora/")} == expected


def test_lora_imports_its_own_modules_relatively():
    """So that the same files work as `lora` in a clone and as `ptdit_diffusers.lora` in the wheel."""
    for path in (path for path in SOURCES if path.parts[0] == "lora"):
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "lora"], path


def model_folders() -> list[Path]:
    return sorted(path.parent for path in (ROOT / "ptdit_diffusers/weights").glob("*/model_index.json"))


def test_a_model_lies_in_the_package():
    assert "shapes-128" in [folder.name for folder in model_folders()]


@pytest.mark.parametrize("folder", model_folders(), ids=lambda folder: folder.name)
def test_an_embedded_model_is_small_documented_and_keeps_its_weights_as_safetensors(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= WEIGHTS_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    parts = {"text_encoder", "vae", "transformer", "unet"} & set(json.loads((folder / "model_index.json").read_text()))
    assert all((folder / part / "config.json").is_file() for part in parts)
    parts = {part for part in parts if f"{folder.name}/{part}" not in SAME}  # which another model has
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == parts
    assert len([path for path in files if path.suffix == ".safetensors"]) == len(parts)
    assert (folder / "README.md").is_file()
    for config in (path for path in files if path.name == "config.json"):  # no path of the machine that trained it
        assert not json.loads(config.read_text(encoding="utf-8")).get("_name_or_path"), config
