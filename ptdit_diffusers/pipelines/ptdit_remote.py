"""What a model folder needs to carry this code: its entry files, and a copy of the code when it is saved again.

A folder with code loads where this package is not installed.
"""

import json
import shutil
import sys
from pathlib import Path

ENTRY, MODULAR_ENTRY = "pipeline.py", "modular_config.json"
_ENTRY_TEXT = '''"""Entry of this repository's code. `DiffusionPipeline` runs it with `custom_pipeline="pipeline"` and
`trust_remote_code=True`, `ModularPipeline` with `trust_remote_code=True` alone.

Where the package ptdit_diffusers is installed that one is used; else the files beside this one.
"""

import importlib.util

if importlib.util.find_spec("ptdit_diffusers") is not None:
    PTDiTPipeline = importlib.import_module("ptdit_diffusers").PTDiTPipeline
    PTDiTBlocks = importlib.import_module("ptdit_diffusers").PTDiTBlocks
else:
{imports}
    from .modular_ptdit import PTDiTBlocks
    from .pipeline_ptdit import PTDiTPipeline
    from .ptdit_registration import register_classes

    register_classes()
'''


def entry_files(modules: list[str]) -> dict[str, str]:
    """Return name and text of the entry file, and of the file that tells `ModularPipeline` about it.

    diffusers copies only those files of a local folder that the entry file itself imports, so it names each of them,
    and it takes the one pipeline class in the file, so no other is imported by its name.

    Args:
        modules: Names of the code files without ".py".
    """
    named = ("modular_ptdit", "pipeline_ptdit", "ptdit_registration")
    lines = [f"    from .{name} import __doc__ as _" for name in modules if name not in named]
    modular = {"_class_name": "PTDiTBlocks", "auto_map": {"ModularPipelineBlocks": "pipeline.PTDiTBlocks"}}
    return {
        ENTRY: _ENTRY_TEXT.format(imports="\n".join(lines)),
        MODULAR_ENTRY: json.dumps(modular, indent=2) + "\n",
    }


def copy_code(pipeline_class: type, folder: str | Path) -> None:
    """Copy the code of a pipeline to the folder it was saved to; do nothing for an installed package."""
    package = pipeline_class.__module__.rpartition(".")[0]
    if not package.startswith("diffusers_modules."):
        return
    names = [name for name in sys.modules if name.rpartition(".")[0] == package and "ptdit" in name[len(package) :]]
    for name in names:
        shutil.copy(sys.modules[name].__file__, folder)
    modules = sorted(name.rpartition(".")[2] for name in names)
    for name, text in entry_files(modules).items():
        Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
