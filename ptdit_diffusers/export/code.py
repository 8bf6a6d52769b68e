"""Writes the pipelines' code as files for a Hub repository: the package's own modules, flat, with relative imports.

There is no second copy to maintain: the files are written from the installed package each time.
"""

import ast
import re
from pathlib import Path

from ptdit_diffusers.pipelines.ptdit_remote import entry_files

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = "pipelines.ptdit_registration"  # imports every pipeline


def write_code(folder: str | Path, pipeline: str = "PTDiTPipeline") -> list[str]:
    """Write the entry files and every module that they need, and return the names of the files, sorted.

    Args:
        folder: A model folder that exists.
        pipeline: Name of its pipeline class.
    """
    modules = needed_modules()
    flat = flat_names(modules)
    files = {f"{flat[module]}.py": flatten(module, flat) for module in modules}
    files |= entry_files(sorted(flat.values()), pipeline)
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
    return sorted(files)


def needed_modules() -> list[str]:
    """Return the sorted names, without the package's, of ROOT and all modules that it imports, directly or not."""
    found, waiting = set(), [ROOT]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [target for _, target in package_imports(module)]
    return sorted(found)


def package_imports(module: str) -> list[tuple[ast.ImportFrom, str]]:
    """Return the statements `from ... import ...` of a module that import from the package, each with its target."""
    imports = []
    for node in ast.walk(ast.parse(source(module))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".")
        if node.level:
            base = module.split(".")[: -node.level]
            imports.append((node, ".".join([*base, *parts])))
        elif parts[0] == PACKAGE.name:
            imports.append((node, ".".join(parts[1:])))
    return imports


def source(module: str) -> str:
    """Return the text of a module of the package."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def flat_names(modules: list[str]) -> dict[str, str]:
    """Return file names for modules. All local repositories share one namespace, so each name contains `ptdit`."""
    names = {}
    for module in modules:
        stem = module.rpartition(".")[2]
        names[module] = stem if "ptdit" in stem else f"ptdit_{stem}"
    assert len(set(names.values())) == len(names), f"two modules would have the same file name: {names}"
    return names


def flatten(module: str, flat: dict[str, str]) -> str:
    """Return the text of a module, with its imports from the package changed to imports from the files beside it.

    `from . name import` with a space is the same to Python, but not to diffusers: for a Hub id it requests the file
    behind each `from .name import` again, along every path that leads to it, which for these files takes minutes. The
    entry file imports each of them once, without the space, and that is enough.
    """
    lines = source(module).splitlines(keepends=True)
    for node, target in package_imports(module):
        statement = re.compile(r"from\s+[\w.]+\s+import")
        assert statement.search(lines[node.lineno - 1]), f"{module}:{node.lineno} is not one import"
        lines[node.lineno - 1] = statement.sub(f"from . {flat[target]} import", lines[node.lineno - 1], count=1)
    return "".join(lines)
