"""The list of our nodes, as ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes_class import PTDiTClass, PTDiTClassGuidance
from .nodes_load import PTDiTFolderLoader, PTDiTVAELoader
from .nodes_model import PTDiTModelSampling, PTDiTProxyMap, PTDiTWindowProxy
from .nodes_sample import PTDiTEmptyLatent, PTDiTScheduler, PTDiTTextEncode
from .nodes_views import PTDiTContactSheet, PTDiTViewsToBatch

NODES = (
    PTDiTFolderLoader,
    PTDiTVAELoader,
    PTDiTTextEncode,
    PTDiTClass,
    PTDiTEmptyLatent,
    PTDiTWindowProxy,
    PTDiTModelSampling,
    PTDiTScheduler,
    PTDiTClassGuidance,
    PTDiTProxyMap,
    PTDiTViewsToBatch,
    PTDiTContactSheet,
)


class PTDiTExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Node classes in menu order."""
        return list(NODES)


async def comfy_entrypoint() -> PTDiTExtension:
    """What ComfyUI calls after import."""
    return PTDiTExtension()
