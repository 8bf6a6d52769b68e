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
{installed}
else:
{imports}
    from .ptdit_registration import register_classes

    register_classes()
'''
# Pipeline of a folder -> what its entry file offers, and the modules (as files of the folder) that have it.
_OFFERED = {
    "PTDiTPipeline": {"PTDiTBlocks": "modular_ptdit", "PTDiTPipeline": "pipeline_ptdit"},
    "ClassToImagePipeline": {"ClassToImagePipeline": "ptdit_pipeline_class_to_image"},
    "DiffiTImagePipeline": {"DiffiTImagePipeline": "ptdit_pipeline_diffit_image"},
}


def entry_files(modules: list[str], pipeline: str = "PTDiTPipeline") -> dict[str, str]:
    """Return name and text of the entry file, and of the file that tells `ModularPipeline` about it, if it can.

    diffusers copies only those files of a local folder that the entry file itself imports, so it names each of them,
    and it takes the one pipeline class in the file, so no other is imported by its name.

    Args:
        modules: Names of the code files without ".py".
        pipeline: Name of the folder's pipeline class, one of `_OFFERED` or of the PT-DiT pipelines.
    """
    offered = _OFFERED.get(pipeline, _OFFERED["PTDiTPipeline"])
    lines = [f"    from .{name} import __doc__ as _" for name in modules
             if name not in (*offered.values(), "ptdit_registration")]  # fmt: skip
    lines += [f"    from .{module} import {name}" for name, module in offered.items()]
    installed = [f'    {name} = importlib.import_module("ptdit_diffusers").{name}' for name in offered]
    files = {ENTRY: _ENTRY_TEXT.format(installed="\n".join(installed), imports="\n".join(lines))}
    if "PTDiTBlocks" in offered:
        modular = {"_class_name": "PTDiTBlocks", "auto_map": {"ModularPipelineBlocks": "pipeline.PTDiTBlocks"}}
        files[MODULAR_ENTRY] = json.dumps(modular, indent=2) + "\n"
    return files


def copy_code(pipeline_class: type, folder: str | Path) -> None:
    """Copy the code of a pipeline to the folder it was saved to; do nothing for an installed package."""
    package = pipeline_class.__module__.rpartition(".")[0]
    if not package.startswith("diffusers_modules."):
        return
    names = [name for name in sys.modules if name.rpartition(".")[0] == package and "ptdit" in name[len(package) :]]
    for name in names:
        shutil.copy(sys.modules[name].__file__, folder)
    modules = sorted(name.rpartition(".")[2] for name in names)
    for name, text in entry_files(modules, pipeline_class.__name__).items():
        Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
