"""PT-DiT as a native ComfyUI model, and its nodes.

Outside ComfyUI the package is empty, so that its pure parts can be imported and tested alone.
"""

import importlib.util
import logging

MINIMUM_VERSION = (0, 3, 60)  # attention takes transformer_options since then
WEB_DIRECTORY = "./web"


def version_message(version: str) -> str | None:
    """Why a ComfyUI of that version cannot run the nodes, or None if it can."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers >= MINIMUM_VERSION:
        return None
    wanted = ".".join(map(str, MINIMUM_VERSION))
    return f"PT-DiT nodes need ComfyUI {wanted} or newer; this is {version}. Update ComfyUI, then they will load."


NODE_CLASS_MAPPINGS: dict | None = None  # None: ask comfy_entrypoint
comfy_entrypoint = None

if importlib.util.find_spec("comfy_api") is not None:
    from comfyui_version import __version__ as comfyui_version

    problem = version_message(comfyui_version)
    if problem is None:
        from .library import load_library

        load_library()
        from .hooks import register
        from .nodes import comfy_entrypoint  # noqa: F401

        register()
    else:
        logging.error(problem)
        NODE_CLASS_MAPPINGS = {}  # nothing to offer, and nothing to crash
