"""What a model folder needs to carry this code: its entry file, and a copy of the code when it is saved again.

A folder with code loads where this package is not installed. It must not know weights or how a call works.
"""

import shutil
import sys
from pathlib import Path

ENTRY = "pipeline.py"
_ENTRY_TEXT = '''"""Entry of this repository's code: `custom_pipeline="pipeline", trust_remote_code=True` runs it.

Where the package ptdit_diffusers is installed that one is used; else the files beside this one.
"""

import importlib.util

if importlib.util.find_spec("ptdit_diffusers") is not None:
    PTDiTPipeline = importlib.import_module("ptdit_diffusers").PTDiTPipeline
else:
{imports}
    from .pipeline_ptdit import PTDiTPipeline
'''


def entry_code(modules: list[str]) -> str:
    """Text of the entry file.

    diffusers copies only those files of a local folder that the entry file itself imports, so it names each of them,
    and it takes the one pipeline class that the file shows, so nothing else is named.

    Args:
        modules: Names of the code files without ".py".
    """
    lines = [f"    from .{name} import __doc__ as _" for name in modules if name != "pipeline_ptdit"]
    return _ENTRY_TEXT.format(imports="\n".join(lines))


def copy_code(pipeline_class: type, folder: str | Path) -> None:
    """Put the code that a pipeline came with into the folder it was saved to; nothing for an installed package."""
    package = pipeline_class.__module__.rpartition(".")[0]
    if not package.startswith("diffusers_modules."):
        return
    names = [name for name in sys.modules if name.rpartition(".")[0] == package and "ptdit" in name[len(package) :]]
    for name in names:
        shutil.copy(sys.modules[name].__file__, folder)
    modules = sorted(name.rpartition(".")[2] for name in names)
    Path(folder, ENTRY).write_text(entry_code(modules), encoding="utf-8")
