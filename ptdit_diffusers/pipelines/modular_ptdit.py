"""Text to picture, video and views as modular blocks, where a guider of diffusers takes the place of `guidance_scale`.

Each block calls what the pipelines of one call are made of; there is no maths here. It must not know the inside of the
network, key names or training.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .pipeline_ptdit import PTDiTPipeline
from .ptdit_checks import check_settings
from .ptdit_denoising import TEXT_TENSORS, PTDiTDenoisingMixin
from .ptdit_lora import PTDiTLoraLoaderMixin
from .ptdit_parts import PTDiTPartsMixin
from .ptdit_text import join_text

COMPONENTS = {
    "tokenizer": PreTrainedTokenizerBase,
    "text_encoder": T5EncoderModel,
    "transformer": PTDiTTransformer3DModel,
    "vae": AutoencoderKLOpenSoraPlan,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
PROMPTS = ("prompt", "negative_prompt", *TEXT_TENSORS)
ARGUMENTS = inspect.signature(PTDiTPipeline.__call__).parameters  # the blocks take what that call takes


class PTDiTModularPipeline(PTDiTPartsMixin, PTDiTDenoisingMixin, PTDiTLoraLoaderMixin, ModularPipeline):
    """Holds the components that the blocks work with, and guides as its `guider` says.

    `load_components()` loads them; `update_components(guider=...)` takes another guider. A call returns the state of
    all blocks, or with `output="images"` one member of it.

    Examples:
        >>> import torch
        >>> from diffusers import AdaptiveProjectedGuidance
        >>> from ptdit_diffusers import PTDiTModularPipeline
        >>> pipe = PTDiTModularPipeline.from_pretrained("shapes-128")
        >>> pipe.load_components()
        >>> pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=6.0))
        >>> picture = pipe(prompt="a red circle", output="images", generator=torch.manual_seed(0))[0]
    """

    default_blocks_name = "PTDiTBlocks"
    progress_bar = DiffusionPipeline.progress_bar
    set_progress_bar_config = DiffusionPipeline.set_progress_bar_config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PTDiTModularPipeline":
        """Read what to load from a folder, a Hub id, or the short name of a model that comes with the package.

        Args:
            pretrained_model_name_or_path: E.g. "shapes-128". A local folder of that name goes first.
            kwargs: Options of `ModularPipeline.from_pretrained`.
        """
        # called on a class of its own, diffusers does not look up which modular pipeline an ordinary folder is for
        return ModularPipeline.from_pretrained(resolve_model(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the components as `PTDiTPipeline` does, which both kinds of pipeline load; a guider is not saved.

        Args:
            save_directory: Folder to write to.
            kwargs: Options of `DiffusionPipeline.save_pretrained`.
        """
        PTDiTPipeline(**{name: getattr(self, name) for name in COMPONENTS}).save_pretrained(save_directory, **kwargs)

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether the guider asks for a second prediction in any step."""
        self.guider.set_state(step=0, num_inference_steps=None, timestep=None)  # no step of a call: all of them
        return self.guider.num_conditions > 1

    def guidance_texts(self, tensors: dict[str, torch.Tensor | None]) -> dict[str, tuple[torch.Tensor | None, ...]]:
        """What a forward reads of the text, as pairs (of the prompt, of the negative prompt), for the guider."""
        embeds, masks = [], []
        for name in ("prompt", "negative_prompt"):
            text, mask = tensors[f"{name}_embeds"], tensors[f"{name}_attention_mask"]
            if text is not None:
                text, mask = join_text([text], [mask])
                text = text.to(self.transformer.dtype)
            embeds.append(text)
            masks.append(mask)
        return {"encoder_hidden_states": tuple(embeds), "encoder_attention_mask": tuple(masks)}

    def guided_flow(
        self,
        latents: torch.Tensor,
        texts: dict[str, tuple[torch.Tensor | None, ...]],
        step: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Flow (B, C, F, H, W) that the guider makes of one forward for each prediction it asks for."""
        guider = self.guider
        guider.set_state(step=step, num_inference_steps=self._num_timesteps, timestep=self._current_timestep)
        predictions = guider.prepare_inputs(texts)
        for prediction in predictions:
            text = prediction.encoder_hidden_states, prediction.encoder_attention_mask
            name = prediction[guider._identifier_key]  # caches keep the predictions apart
            guider.prepare_models(self.transformer)
            try:
                prediction.noise_pred = self.predict_flow(latents, *text, step, options, context=name)
            finally:
                guider.cleanup_models(self.transformer)
        return guider(predictions)[0]


class PTDiTBlock(ModularPipelineBlocks):
    """A block that says in `takes`, `gives` and `uses` what it reads, what it adds and which components it needs."""

    model_name = "ptdit"
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """First line of the docstring."""
        return inspect.getdoc(type(self)).partition("\n")[0]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """What the block needs to be loaded; a guider is made and need not be."""
        guidance = FrozenDict({"guidance_scale": ARGUMENTS["guidance_scale"].default})
        guider = ComponentSpec(
            "guider", ClassifierFreeGuidance, config=guidance, default_creation_method="from_config"
        )
        return [guider if name == "guider" else ComponentSpec(name, COMPONENTS[name]) for name in self.uses]

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments of `PTDiTPipeline` with its defaults, and what earlier blocks gave."""
        known = [ARGUMENTS.get(name) for name in self.takes]
        return [
            InputParam(name, required=True, description="from an earlier block")
            if argument is None
            else InputParam(name, argument.annotation, argument.default, description="as in a call of PTDiTPipeline")
            for name, argument in zip(self.takes, known, strict=True)
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block adds to the state."""
        return [OutputParam(name) for name in self.gives]

    @torch.no_grad()
    def __call__(
        self, components: PTDiTModularPipeline, state: PipelineState
    ) -> tuple[PTDiTModularPipeline, PipelineState]:
        """Do the block's work on its part of the state."""
        block = self.get_block_state(state)
        self.work(components, block)
        self.set_block_state(state, block)
        return components, state

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Read from `block` what `takes` names and set what `gives` names."""
        raise NotImplementedError(f"{type(self).__name__} does nothing")


class PTDiTCheckBlock(PTDiTBlock):
    """Checks all arguments before any long work, and fills in the model's own size."""

    uses = ("transformer", "vae", "guider")
    takes = (
        *PROMPTS, "height", "width", "num_frames", "num_views", "num_inference_steps", "sigmas", "timesteps",
        "num_images_per_prompt", "generator", "latents", "max_sequence_length", "window_size", "proxy_ratio",
        "output_type",
    )  # fmt: skip
    gives = ("height", "width", "num_frames", "samples")

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set `height` and `width` in pixels, `num_frames` (of views: see `clip_length`) and `samples`, prompts *
        pictures per prompt.
        """
        check_settings(
            block.num_inference_steps, block.sigmas, block.timesteps, 1.0, block.max_sequence_length,
            block.window_size, block.proxy_ratio,
        )  # fmt: skip
        block.height, block.width = components.fill_size(block.height, block.width)
        block.num_frames = components.clip_length(block.num_frames, block.num_views)
        block.samples = components.check_inputs(
            block.prompt, block.negative_prompt, block.height, block.width, block.num_frames,
            block.num_images_per_prompt, block.generator, block.latents, *(block[name] for name in TEXT_TENSORS),
            block.output_type,
        )  # fmt: skip


class PTDiTTextBlock(PTDiTBlock):
    """Turns prompts into embeddings; the negative one only if the guider uses it."""

    uses = ("tokenizer", "text_encoder", "guider")
    takes = (*PROMPTS, "num_images_per_prompt", "clean_caption", "max_sequence_length")
    gives = TEXT_TENSORS

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set embeddings (B, L, width) and masks (B, L)."""
        texts = components.encode_prompt(
            block.prompt, block.negative_prompt, components.needs_negative_prompt, block.num_images_per_prompt,
            components._execution_device, *(block[name] for name in TEXT_TENSORS), block.clean_caption,
            block.max_sequence_length,
        )  # fmt: skip
        for name, text in zip(TEXT_TENSORS, texts, strict=True):
            block[name] = text


class PTDiTNoiseBlock(PTDiTBlock):
    """Draws the noise that the steps begin with, sample by sample, or takes the given one."""

    uses = ("transformer", "vae")
    takes = ("samples", "height", "width", "num_frames", "generator", "latents")
    gives = ("latents",)

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set `latents` (B, C, F, H, W)."""
        shape = components.latent_shape(block.samples, block.height, block.width, block.num_frames)
        block.latents = components.prepare_latents(shape, components._execution_device, block.generator, block.latents)


class PTDiTDenoiseBlock(PTDiTBlock):
    """Steps from noise to picture; the guider says which predictions a step needs and what becomes of them."""

    uses = ("transformer", "scheduler", "guider")
    takes = (
        "latents", *TEXT_TENSORS, "height", "width", "num_frames", "num_inference_steps", "sigmas", "timesteps",
        "generator", "attention_kwargs", "window_size", "proxy_ratio",
    )  # fmt: skip
    gives = ("latents",)

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Replace `latents` (B, C, F, H, W)."""
        times = components.prepare_timesteps(
            block.num_inference_steps, block.sigmas, block.height, block.width, block.num_frames, block.timesteps
        )
        tensors = {name: block[name] for name in ("latents", *TEXT_TENSORS)}
        options = components.network_options(block, tuple(block.latents.shape))
        block.latents = components.denoise(tensors, times, options, None, [])
        components.transformer._reset_stateful_cache()


class PTDiTDecodeBlock(PTDiTBlock):
    """Turns latents into pictures, videos or views."""

    uses = ("transformer", "vae")
    takes = ("latents", "num_views", "output_type")
    gives = ("images", "videos", "views")

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set `views` with `num_views`, else `images` for one frame or `videos`; the others are None."""
        views = block.num_views is not None
        kind = "views" if views else "images" if block.latents.shape[2] == 1 else "videos"
        made = components.decode_latents(block.latents, block.output_type, views)
        for name in self.gives:
            block[name] = made if name == kind else None


class PTDiTBlocks(SequentialPipelineBlocks):
    """Text to picture, to video and to views with PT-DiT, guided by any guider of diffusers."""

    model_name = "ptdit"
    block_names = ["check", "text_encoder", "noise", "denoise", "decode"]
    block_classes = [PTDiTCheckBlock, PTDiTTextBlock, PTDiTNoiseBlock, PTDiTDenoiseBlock, PTDiTDecodeBlock]

    @property
    def description(self) -> str:
        """First line of the docstring."""
        return inspect.getdoc(type(self))
