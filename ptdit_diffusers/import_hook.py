"""Registers our classes as soon as diffusers is imported, so that `import ptdit_diffusers` alone stays free of cost.

diffusers has no place where packages announce themselves. Where it is imported already, our classes are registered at
once; otherwise a finder in front of Python's own waits for it. It must not know what is registered.
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
PIPELINES = ("pipeline_ptdit", "pipeline_ptdit_img2img", "pipeline_ptdit_inpaint", "modular_ptdit")


class DiffusersFinder(MetaPathFinder):
    """Finds `diffusers` as Python would and has our classes registered once it is loaded. Finds nothing else."""

    def __init__(self) -> None:
        self.looking = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Python's own answer for `diffusers`, with the registration behind its loading; None for other modules."""
        if fullname != "diffusers" or self.looking:
            return None
        self.looking = True  # the search below asks this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register_now()

        spec.loader.exec_module = load_and_register
        return spec


def when_diffusers_is_imported() -> None:
    """Register now if diffusers is there, else when it comes. Called again it does nothing more."""
    if "diffusers" in sys.modules:
        register_now()
    elif not any(type(finder).__name__ == DiffusersFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, DiffusersFinder())


def register_now() -> None:
    """Register everything; a problem is a warning, because someone else may be importing diffusers for other ends.

    While one of our own modules is being imported nothing is done: it cannot be imported a second time before it is
    complete, and every module with a pipeline registers at its end.
    """
    ours = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.") and name != __name__]
    if any(getattr(module.__spec__, "_initializing", False) for module in ours):
        return
    try:
        register()
    except Exception as problem:
        warnings.warn(f"diffusers will not find the classes of {PACKAGE}: {problem}", stacklevel=2)


def register() -> None:
    """Import all pipelines; each registers itself, with the models it needs, at the end of its module.

    Reading single files is more than these modules need, so it comes by itself.
    """
    for name in PIPELINES:
        importlib.import_module(f"{PACKAGE}.pipelines.{name}")
    importlib.import_module(f"{PACKAGE}.conversion.single_file")
