"""ComfyUI's entry point when the whole repository lies in `custom_nodes`. Outside ComfyUI it does nothing."""

import importlib.util

if importlib.util.find_spec("comfy_api") is not None:
    from .comfyui_nodes import NODE_CLASS_MAPPINGS, comfy_entrypoint

    WEB_DIRECTORY = "./comfyui_nodes/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "WEB_DIRECTORY", "comfy_entrypoint"]
