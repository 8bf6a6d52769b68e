"""PT-DiT (Qihoo-T2X) for diffusers and ComfyUI.

Public names are loaded when they are first used, so `import ptdit_diffusers` is cheap, and the plain-torch code in
`ptdit_diffusers.core` needs neither diffusers nor transformers. Whether diffusers is imported before or after, its own
loaders find our classes.
"""

import importlib
from typing import Any

from .import_hook import register, register_when_diffusers_is_imported

__version__ = "0.1.0"

_MODULES = {  # public name -> module of it
    "AutoencoderKLOpenSoraPlan": "models.autoencoder_ptdit",
    "ClassToImagePipeline": "pipelines.pipeline_class_to_image",
    "DiffiT2DModel": "models.transformer_diffit",
    "DiffiTImagePipeline": "pipelines.pipeline_diffit_image",
    "DiffiTUNet2DModel": "models.unet_diffit",
    "DiT2DModel": "models.transformer_dit",
    "PTDiTBlocks": "pipelines.modular_ptdit",
    "PTDiTImg2ImgPipeline": "pipelines.pipeline_ptdit_img2img",
    "PTDiTInpaintPipeline": "pipelines.pipeline_ptdit_inpaint",
    "PTDiTLoraLoaderMixin": "pipelines.ptdit_lora",
    "PTDiTModularPipeline": "pipelines.modular_ptdit",
    "PTDiTPipeline": "pipelines.pipeline_ptdit",
    "PTDiTPipelineOutput": "pipelines.ptdit_base",
    "PTDiTTransformer3DModel": "models.transformer_ptdit",
    "PowerCosineGuidance": "pipelines.ptdit_guiders",
    "contact_sheet": "core.views",
    "embedded_model_path": "core.embedded",
    "official_scheduler": "pipelines.class_sampling",
    "respaced_timesteps": "core.diffusion",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "ModelMixin":  # diffusers looks for it here when a model_index.json names our package
        return importlib.import_module("diffusers").ModelMixin
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "embedded_model_path":
        register()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_diffusers_is_imported()
