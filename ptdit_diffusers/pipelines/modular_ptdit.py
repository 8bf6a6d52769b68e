"""Text to image, video and views as modular blocks, where a guider of diffusers takes the place of `guidance_scale`.

Each block calls one step of `PTDiTPipeline.generate`; both pipelines have these steps from the same mixins.
"""

import inspect
import math
from contextlib import nullcontext
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
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .pipeline_ptdit import PTDiTPipeline
from .ptdit_checks import ChecksMixin, check_numbers
from .ptdit_denoising import DenoisingMixin, Tensors
from .ptdit_latents import LatentsMixin
from .ptdit_lora import PTDiTLoraLoaderMixin, warn_of_student
from .ptdit_schedulers import exclusive
from .ptdit_text import TEXT_TENSORS, TextMixin, join_text

COMPONENTS = {
    "tokenizer": PreTrainedTokenizerBase,
    "text_encoder": T5EncoderModel,
    "transformer": PTDiTTransformer3DModel,
    "vae": AutoencoderKLOpenSoraPlan,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
PROMPTS = ("prompt", "negative_prompt", *TEXT_TENSORS)
COPY = (  # of a pipeline, with a scheduler and a guider of its own
    "other = pipe.blocks.init_pipeline(); other.update_components(**{**pipe.components, "
    "'scheduler': copy.deepcopy(pipe.scheduler), 'guider': copy.deepcopy(pipe.guider)})"
)
ARGUMENTS = inspect.signature(PTDiTPipeline.__call__).parameters  # the blocks take what that call takes


class PTDiTModularPipeline(
    ChecksMixin, TextMixin, LatentsMixin, DenoisingMixin, PTDiTLoraLoaderMixin, ModularPipeline
):
    """Holds the components that the blocks work with, and guides as its `guider` says.

    `load_components()` loads them; `update_components(guider=...)` sets another guider. A call returns the state of
    all blocks, or with `output="images"` one member of it.

    Examples:
        >>> import torch
        >>> from diffusers import AdaptiveProjectedGuidance
        >>> from ptdit_diffusers import PTDiTModularPipeline
        >>> pipe = PTDiTModularPipeline.from_pretrained("shapes-128")
        >>> pipe.load_components()
        >>> pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=6.0))
        >>> image = pipe(prompt="a red circle", output="images", generator=torch.manual_seed(0))[0]
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the blocks, as `ModularPipeline` does, unless another call with the same scheduler is not finished."""
        scheduler = getattr(self, "scheduler", None)  # a pipeline of some blocks may have none
        with nullcontext() if scheduler is None else exclusive(scheduler, COPY):
            return super().__call__(*args, **kwargs)

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether the guider asks for a second prediction in any step."""
        return self.predictions() > 1

    def predictions(self, call: BlockState | None = None) -> int:
        """Return how many predictions the guider combines in a step."""
        self.guider.set_state(step=0, num_inference_steps=None, timestep=None)  # no step of a call: all of them
        return self.guider.num_conditions

    def guidance_texts(self, tensors: Tensors) -> dict[str, tuple[Tensor | None, ...]]:
        """Return what the network reads of the text, as pairs (prompt, negative prompt) for the guider."""
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
        latents: Tensor,
        texts: dict[str, tuple[Tensor | None, ...]],
        step: int,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the flow (B, C, F, H, W) that the guider combines from one forward per prediction it asks for."""
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


def check_guider(guider: Any) -> None:
    """Raise unless every scale of a guider is a finite number of at least 0, and its `guidance_rescale` at most 1."""
    for name, value in vars(guider).items():
        if name.endswith(("scale", "scales")) and not name.startswith("_"):
            most = 1.0 if name == "guidance_rescale" else math.inf
            for one in value if isinstance(value, (list, tuple)) else [value]:
                check_numbers({f"{type(guider).__name__}({name})": (one, most)})


class PTDiTPipelineBlock(ModularPipelineBlocks):
    """A block that lists in `takes` what it reads, in `gives` what it sets and in `uses` the components it needs."""

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
        """The components to load, and the guider, which needs no loading."""
        guidance = FrozenDict({"guidance_scale": ARGUMENTS["guidance_scale"].default})
        guider = ComponentSpec(
            "guider", ClassifierFreeGuidance, config=guidance, default_creation_method="from_config"
        )
        return [guider if name == "guider" else ComponentSpec(name, COMPONENTS[name]) for name in self.uses]

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments of `PTDiTPipeline` with its defaults, and what earlier blocks set."""
        known = [ARGUMENTS.get(name) for name in self.takes]
        return [
            InputParam(name, required=True, description="from an earlier block")
            if argument is None
            else InputParam(name, argument.annotation, argument.default, description="as in a call of PTDiTPipeline")
            for name, argument in zip(self.takes, known, strict=True)
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block sets in the state."""
        return [OutputParam(name) for name in self.gives]

    @torch.no_grad()
    def __call__(
        self, components: PTDiTModularPipeline, state: PipelineState
    ) -> tuple[PTDiTModularPipeline, PipelineState]:
        """Run `work` on the part of the state that the block reads and sets."""
        block = self.get_block_state(state)
        self.work(components, block)
        self.set_block_state(state, block)
        return components, state

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Read from `block` what `takes` names and set what `gives` names."""
        raise NotImplementedError(f"{type(self).__name__} has no `work`")


class PTDiTCheckBlock(PTDiTPipelineBlock):
    """Checks all arguments before any long work, and fills in the model's own size."""

    uses = ("transformer", "vae", "guider")
    takes = (
        *PROMPTS, "height", "width", "num_frames", "num_views", "num_inference_steps", "sigmas", "timesteps",
        "num_images_per_prompt", "generator", "latents", "max_sequence_length", "window_size", "proxy_ratio",
        "output_type",
    )  # fmt: skip
    gives = ("height", "width", "num_frames", "samples")

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set sizes and `samples`; see `check_call` and `check_guider`."""
        check_guider(components.guider)
        components.check_call(block)


class PTDiTTextBlock(PTDiTPipelineBlock):
    """Encodes the prompts; the negative one only if the guider uses it."""

    uses = ("tokenizer", "text_encoder", "guider")
    takes = (*PROMPTS, "num_images_per_prompt", "clean_caption", "max_sequence_length", "attention_kwargs")
    gives = TEXT_TENSORS

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set embeddings (B, L, width) and masks (B, L)."""
        for name, text in components.encode_texts(block, components.needs_negative_prompt).items():
            block[name] = text


class PTDiTNoiseBlock(PTDiTPipelineBlock):
    """Samples the noise that the steps begin with, or takes the given one."""

    uses = ("transformer", "vae")
    takes = ("samples", "height", "width", "num_frames", "generator", "latents")
    gives = ("latents",)

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set `latents` (B, C, F, H, W)."""
        block.latents = components.prepare_noise(block)


class PTDiTDenoiseBlock(PTDiTPipelineBlock):
    """Steps from noise to latents; the guider says which predictions a step needs and combines them."""

    uses = ("transformer", "scheduler", "guider")
    takes = (
        "latents", *TEXT_TENSORS, "height", "width", "num_frames", "num_inference_steps", "sigmas", "timesteps",
        "generator", "attention_kwargs", "window_size", "proxy_ratio",
    )  # fmt: skip
    gives = ("latents",)

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Replace `latents` (B, C, F, H, W)."""
        scale = getattr(components.guider, "guidance_scale", 1.0) if components.predictions() > 1 else 1.0
        warn_of_student(components.transformer, scale, block.num_frames, block.height, block.width)
        timesteps = components.prepare_schedule(block)
        tensors = {name: block[name] for name in ("latents", *TEXT_TENSORS)}
        block.latents = components.denoise(block, tensors, timesteps)
        components.transformer._reset_stateful_cache()


class PTDiTDecodeBlock(PTDiTPipelineBlock):
    """Decodes latents to images, videos or views."""

    uses = ("transformer", "vae")
    takes = ("latents", "num_views", "output_type")
    gives = ("images", "videos", "views")

    def work(self, components: PTDiTModularPipeline, block: BlockState) -> None:
        """Set `views` with `num_views`, else `images` for one frame or `videos`; the others are None."""
        views = block.num_views is not None
        kind = "views" if views else "images" if block.latents.shape[2] == 1 else "videos"
        result = components.decode_latents(block.latents, block.output_type, views)
        for name in self.gives:
            block[name] = result if name == kind else None


class PTDiTBlocks(SequentialPipelineBlocks):
    """Text to image, to video and to views with PT-DiT, guided by any guider of diffusers."""

    model_name = "ptdit"
    block_names = ["check", "text_encoder", "noise", "denoise", "decode"]
    block_classes = [PTDiTCheckBlock, PTDiTTextBlock, PTDiTNoiseBlock, PTDiTDenoiseBlock, PTDiTDecodeBlock]

    @property
    def description(self) -> str:
        """First line of the docstring."""
        return inspect.getdoc(type(self))
