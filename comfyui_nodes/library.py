"""Make `ptdit_diffusers` importable: the copy beside this folder, else an installed one.

`sys.path` stays as it is: names such as `scripts` or `tests` would leak into ComfyUI.
"""

import importlib.util
import sys
from pathlib import Path

NAME = "ptdit_diffusers"


def load_library() -> None:
    """Import `ptdit_diffusers`, from the folder beside this one if it is there: its version fits the nodes.

    Raises:
        ImportError: It is neither beside this folder nor installed.
    """
    if NAME in sys.modules:
        return
    folder = Path(__file__).resolve().parents[1] / NAME
    if (folder / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    elif importlib.util.find_spec(NAME) is None:
        raise ImportError(
            f"PT-DiT nodes: the folder {folder} is missing and {NAME} is not installed. "
            f"Link the folder comfyui_nodes of a full clone of the repository, or pip install that clone."
        )
