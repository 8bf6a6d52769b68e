"""Makes our classes known to diffusers under its own names, so that its loaders find them. Idempotent.

It changes nothing that diffusers owns: it adds attributes, and entries to the tables that diffusers keeps for this.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from .conversion.keys import official_transformer_state_dict
from .models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan, official_vae_state_dict
from .models.ptdit_backbone import PTDiTBlock
from .models.transformer_ptdit import PTDiTAttnProcessor, PTDiTTransformer3DModel
from .pipelines.ptdit_lora import PTDiTLoraLoaderMixin, expand_block_scales


def register(pipeline: type, output: type) -> None:
    """Adds the pipeline, its output, our models and the LoRA mixin to diffusers' namespaces, loaders and cache tables.

    The pipeline's module calls this at its end, so whoever can name our pipeline can load it.
    """
    for cls in (pipeline, output, PTDiTTransformer3DModel, AutoencoderKLOpenSoraPlan, PTDiTLoraLoaderMixin):
        setattr(diffusers, cls.__name__, cls)
    setattr(diffusers.pipelines, pipeline.__name__, pipeline)
    diffusers.models.PTDiTTransformer3DModel = PTDiTTransformer3DModel
    diffusers.models.AutoencoderKLOpenSoraPlan = AutoencoderKLOpenSoraPlan
    diffusers.loaders.PTDiTLoraLoaderMixin = PTDiTLoraLoaderMixin
    for name in ("AUTO_TEXT2IMAGE_PIPELINES_MAPPING", "AUTO_TEXT2VIDEO_PIPELINES_MAPPING"):
        if hasattr(auto_pipeline, name):  # the second one came with 0.36
            getattr(auto_pipeline, name)["ptdit"] = pipeline
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
        "ptdit_diffusers", {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    )
    SINGLE_FILE_LOADABLE_CLASSES["PTDiTTransformer3DModel"] = {
        "checkpoint_mapping_fn": official_transformer_state_dict,
        "default_subfolder": "transformer",
    }
    SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKLOpenSoraPlan"] = {
        "checkpoint_mapping_fn": single_file_vae,
        "default_subfolder": "vae",
    }
    _SET_ADAPTER_SCALE_FN_MAPPING[PTDiTTransformer3DModel.__name__] = expand_block_scales
    TransformerBlockRegistry.register(
        PTDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    )
    AttentionProcessorRegistry.register(
        PTDiTAttnProcessor,
        AttentionProcessorMetadata(skip_processor_output_fn=lambda _, hidden_states, *a, **k: hidden_states),
    )


def single_file_vae(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, torch.Tensor]:
    """Weights of the VAE from what diffusers reads of a single file.

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
