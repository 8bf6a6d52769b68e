"""Makes our classes known to diffusers under its own names, so that its loaders find them. Idempotent.

It changes nothing that diffusers owns: it adds attributes, and entries to the tables that diffusers keeps for this.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import diffusers
import torch

from ptdit_diffusers.core.backbones.ptdit import PTDiTBlock
from ptdit_diffusers.core.checkpoint_names import official_transformer_state_dict

from .models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan, official_vae_state_dict
from .models.transformer_ptdit import PTDiTAttnProcessor, PTDiTTransformer3DModel
from .pipelines.ptdit_lora import PTDiTLoraLoaderMixin, expand_block_scales

KNOWN_RELEASES = "0.41 to 0.42"


def register_pipeline(pipeline: type, *tasks: str) -> None:
    """Add one pipeline and the models it needs; a pipeline's module calls this at its end.

    Args:
        pipeline: The class.
        tasks: Its places in the AutoPipeline tables, e.g. "TEXT2IMAGE" for `AUTO_TEXT2IMAGE_PIPELINES_MAPPING`.

    Raises:
        ImportError: This release of diffusers lacks a table that we know; says which, and which releases have it.
    """
    register_models()
    setattr(diffusers, pipeline.__name__, pipeline)
    setattr(diffusers.pipelines, pipeline.__name__, pipeline)
    for task in tasks:
        _table("diffusers.pipelines.auto_pipeline", f"AUTO_{task}_PIPELINES_MAPPING")["ptdit"] = pipeline


def register_modular(pipeline: type, blocks: type) -> None:
    """Add the modular pipeline and the blocks it is made of by default.

    Args:
        pipeline: The class that `ModularPipeline.from_pretrained` makes for our folders.
        blocks: Its blocks.
    """
    register_models()
    for cls in (pipeline, blocks):
        setattr(diffusers, cls.__name__, cls)
    names = _table("diffusers.modular_pipelines.modular_pipeline", "MODULAR_PIPELINE_MAPPING")
    names["ptdit"] = lambda _=None: pipeline.__name__


def register_models() -> None:
    """Add transformer, VAE and LoRA mixin, the loaders of single files, and what the caches ask about our blocks."""
    for cls, home in (
        (PTDiTTransformer3DModel, diffusers.models),
        (AutoencoderKLOpenSoraPlan, diffusers.models),
        (PTDiTLoraLoaderMixin, diffusers.loaders),
    ):
        setattr(diffusers, cls.__name__, cls)
        setattr(home, cls.__name__, cls)
    _table("diffusers.pipelines.pipeline_loading_utils", "LOADABLE_CLASSES").setdefault(
        "ptdit_diffusers", {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    )
    single_files = _table("diffusers.loaders.single_file_model", "SINGLE_FILE_LOADABLE_CLASSES")
    single_files["PTDiTTransformer3DModel"] = {
        "checkpoint_mapping_fn": official_transformer_state_dict,
        "default_subfolder": "transformer",
    }
    single_files["AutoencoderKLOpenSoraPlan"] = {"checkpoint_mapping_fn": single_file_vae, "default_subfolder": "vae"}
    scales = _table("diffusers.loaders.peft", "_SET_ADAPTER_SCALE_FN_MAPPING")
    scales["PTDiTTransformer3DModel"] = expand_block_scales
    helpers = "diffusers.hooks._helpers"
    block = _table(helpers, "TransformerBlockMetadata")(
        return_hidden_states_index=0, return_encoder_hidden_states_index=None
    )
    _table(helpers, "TransformerBlockRegistry").register(PTDiTBlock, block)
    processor = _table(helpers, "AttentionProcessorMetadata")(skip_processor_output_fn=_skip_attention)
    _table(helpers, "AttentionProcessorRegistry").register(PTDiTAttnProcessor, processor)


def _table(module: str, name: str) -> Any:
    """Something that diffusers keeps in a place which may move from release to release."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {module}.{name}, so ptdit_diffusers cannot register its "
            f'classes. It knows diffusers {KNOWN_RELEASES}: pip install "diffusers>=0.41,<0.43", or look for a newer '
            "ptdit_diffusers."
        ) from problem


def _skip_attention(_: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """What our attention gives back when a guider skips it: its input."""
    return hidden_states


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
