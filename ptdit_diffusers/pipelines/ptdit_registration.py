"""Adds our classes to diffusers under its own names, so that its loaders, tasks, caches and guiders find them.

It changes nothing that diffusers owns: it adds attributes, and entries to the tables that diffusers keeps for this.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import diffusers
from torch import Tensor

from ptdit_diffusers.core.backbones.diffit import DiffiTBlock
from ptdit_diffusers.core.backbones.dit import DiTBlock, DiTTokenBlock
from ptdit_diffusers.core.backbones.ptdit import PTDiTBlock
from ptdit_diffusers.core.checkpoint_names import official_transformer_state_dict, official_vae_state_dict
from ptdit_diffusers.core.diffit_checkpoints import single_file_diffit
from ptdit_diffusers.core.dit_checkpoints import single_file_dit
from ptdit_diffusers.models.attention_ptdit import PTDiTAttnProcessor
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_diffit import DiffiT2DModel, DiffiTAttnProcessor
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.models.unet_diffit import DiffiTUNet2DModel

from .modular_ptdit import PTDiTBlocks, PTDiTModularPipeline
from .pipeline_class_to_image import ClassToImagePipeline
from .pipeline_diffit_image import DiffiTImagePipeline
from .pipeline_ptdit import PTDiTPipeline
from .pipeline_ptdit_img2img import PTDiTImg2ImgPipeline
from .pipeline_ptdit_inpaint import PTDiTInpaintPipeline
from .ptdit_lora import PTDiTLoraLoaderMixin, expand_block_scales

KNOWN_RELEASES = "0.41 to 0.42"
TASKS = {  # table of AutoPipeline -> our pipeline for that task
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": PTDiTPipeline,
    "AUTO_TEXT2VIDEO_PIPELINES_MAPPING": PTDiTPipeline,
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": PTDiTImg2ImgPipeline,
    "AUTO_INPAINT_PIPELINES_MAPPING": PTDiTInpaintPipeline,
}
NAMESPACES = {  # class -> the module of diffusers that has it, besides `diffusers` itself
    PTDiTTransformer3DModel: diffusers.models,
    AutoencoderKLOpenSoraPlan: diffusers.models,
    DiT2DModel: diffusers.models,
    DiffiT2DModel: diffusers.models,
    DiffiTUNet2DModel: diffusers.models,
    PTDiTLoraLoaderMixin: diffusers.loaders,
    PTDiTPipeline: diffusers.pipelines,
    PTDiTImg2ImgPipeline: diffusers.pipelines,
    PTDiTInpaintPipeline: diffusers.pipelines,
    ClassToImagePipeline: diffusers.pipelines,
    DiffiTImagePipeline: diffusers.pipelines,
    PTDiTModularPipeline: diffusers,
    PTDiTBlocks: diffusers,
}


def register_classes() -> None:
    """Register pipelines, models, the LoRA mixin and the modular blocks. Calling it again changes nothing.

    Raises:
        ImportError: This release of diffusers lacks a table that we need; names it, and the releases that have it.
    """
    for cls, namespace in NAMESPACES.items():
        setattr(diffusers, cls.__name__, cls)
        setattr(namespace, cls.__name__, cls)
    for table, pipeline in TASKS.items():
        _table("diffusers.pipelines.auto_pipeline", table)["ptdit"] = pipeline
    modular_pipelines = _table("diffusers.modular_pipelines.modular_pipeline", "MODULAR_PIPELINE_MAPPING")
    modular_pipelines["ptdit"] = lambda _=None: PTDiTModularPipeline.__name__
    _table("diffusers.pipelines.pipeline_loading_utils", "LOADABLE_CLASSES").setdefault(
        "ptdit_diffusers", {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    )
    single_files = _table("diffusers.loaders.single_file_model", "SINGLE_FILE_LOADABLE_CLASSES")
    single_files["PTDiTTransformer3DModel"] = {
        "checkpoint_mapping_fn": official_transformer_state_dict,
        "default_subfolder": "transformer",
    }
    single_files["AutoencoderKLOpenSoraPlan"] = {"checkpoint_mapping_fn": single_file_vae, "default_subfolder": "vae"}
    for name, mapping in (("DiT2DModel", single_file_dit), ("DiffiT2DModel", single_file_diffit)):
        single_files[name] = {"checkpoint_mapping_fn": mapping, "default_subfolder": "transformer"}
    adapter_scales = _table("diffusers.loaders.peft", "_SET_ADAPTER_SCALE_FN_MAPPING")
    adapter_scales["PTDiTTransformer3DModel"] = expand_block_scales
    for name in ("DiT2DModel", "DiffiT2DModel", "DiffiTUNet2DModel"):
        adapter_scales[name] = lambda _, scales: scales
    _register_blocks()


def _register_blocks() -> None:
    """Describe our blocks and attention to the caches and guiders that skip them."""
    helpers = "diffusers.hooks._helpers"
    block = _table(helpers, "TransformerBlockMetadata")(
        return_hidden_states_index=0, return_encoder_hidden_states_index=None
    )
    for block_class in (PTDiTBlock, DiTBlock, DiTTokenBlock, DiffiTBlock):
        _table(helpers, "TransformerBlockRegistry").register(block_class, block)
    processor = _table(helpers, "AttentionProcessorMetadata")(skip_processor_output_fn=_skip_attention)
    for processor_class in (PTDiTAttnProcessor, DiffiTAttnProcessor):
        _table(helpers, "AttentionProcessorRegistry").register(processor_class, processor)


def _table(module: str, name: str) -> Any:
    """Return something that diffusers keeps in a place which may move from release to release."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {module}.{name}, so ptdit_diffusers cannot register its "
            f'classes. It supports diffusers {KNOWN_RELEASES}: pip install "diffusers>=0.41,<0.43", or look for a '
            "newer ptdit_diffusers."
        ) from problem


def _skip_attention(_: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Return the input: the output of our attention when a guider skips it."""
    return hidden_states


def single_file_vae(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
    """Return the VAE's weights from what diffusers reads of a single file.

    Raises:
        ValueError: The file is a raw training checkpoint. diffusers opens its `state_dict` and drops the averaged
            weights beside it, which are the ones to use.
    """
    if "gen_model" in checkpoint:
        raise ValueError(
            "this is a training checkpoint with averaged weights that from_single_file cannot see; "
            "run `ptdit convert --vae FILE --output DIR`, which takes them, and load that folder."
        )
    return official_vae_state_dict(checkpoint)
