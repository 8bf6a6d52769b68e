"""Registers our classes as soon as diffusers is imported, while `import ptdit_diffusers` alone stays cheap.

diffusers has no entry point for other packages. If it is imported already, our classes are registered at once;
otherwise a finder in front of Python's own waits for it.
"""

import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]


class DiffusersFinder(MetaPathFinder):
    """Finds `diffusers` as Python would, and registers our classes once it is loaded. Finds nothing else."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return Python's own spec of `diffusers`, with the registration after its loading; None for others."""
        if fullname != "diffusers" or self.searching:
            return None
        self.searching = True  # the search below asks this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register_or_warn()

        spec.loader.exec_module = load_and_register
        return spec


def register_when_diffusers_is_imported() -> None:
    """Register now if diffusers is imported, else when it is. Calling it again changes nothing."""
    if "diffusers" in sys.modules:
        register_or_warn()
    elif not any(type(finder).__name__ == DiffusersFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, DiffusersFinder())


def register_or_warn() -> None:
    """Register everything; a failure is a warning, because the program may need diffusers for something else."""
    try:
        register()
    except Exception as problem:
        warnings.warn(f"diffusers will not find the classes of {PACKAGE}: {problem}", stacklevel=2)


def register() -> None:
    """Register all our classes with diffusers, and `from_single_file`. Calling it again changes nothing.

    Raises:
        ImportError: This release of diffusers lacks something that we need.
    """
    from .conversion.single_file import register_single_file_loaders
    from .pipelines.ptdit_registration import register_classes

    register_classes()
    register_single_file_loaders()
