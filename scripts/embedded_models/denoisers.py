"""The backbones that stage "transformer" can train, by name, behind one small interface."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ptdit_diffusers.core.sampling import choose_windows
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline


@dataclass(kw_only=True)
class DenoiserSettings:
    """Backbone and sizes; the other fields of its configuration keep their defaults."""

    backbone: str = "ptdit"  # a name of DENOISERS
    num_attention_heads: int = 3
    attention_head_dim: int = 64
    num_layers: int = 6
    window_size: tuple[int, int, int] = (1, 2, 2)
    proxy_ratio: tuple[int, int, int] = (1, 2, 2)
    start: str = ""  # transformer folder to go on from; "" = new weights


class Denoiser(Protocol):
    """A backbone as the stage trains it.

    Attributes:
        network: What is trained, saved and given to the pipeline.
        middle: Block in the middle, whose output (B, N, width) the layout head reads.
        width: Of its tokens.
    """

    network: ModelMixin
    middle: nn.Module
    width: int

    def predict(self, noisy: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return the flow noise - x_0 in float32, shaped like the noisy latents (B, C, F, H, W).

        Args:
            noisy: Latents (B, C, F, H, W).
            timestep: (B,) in 0..1000; 1000 is noise.
            text: Embeddings (B, L, D).
            mask: (B, L), true where there is text.
        """

    def pipeline(self, **components: Any) -> DiffusionPipeline:
        """Return the pipeline of the network with tokenizer, text_encoder, vae and scheduler."""


class PTDiTDenoiser:
    """PT-DiT.

    Args:
        settings: Sizes, and the weights to go on from.
        latent: Side of the latents in pixels.
        frames: Most latent frames of a sample.
        caption_channels: Width of the text embeddings.
    """

    def __init__(self, settings: DenoiserSettings, latent: int, frames: int, caption_channels: int) -> None:
        window = settings.window_size
        size = {"sample_size": latent, "num_windows": (latent // 2) ** 2 // (window[1] * window[2])}
        if settings.start:  # size and windows are not in the weights: a model of pictures can get windows in time
            windows = {"window_size": window, "proxy_ratio": settings.proxy_ratio}
            self.network = PTDiTTransformer3DModel.from_pretrained(settings.start, **windows, **size)
            check_sizes(settings, self.network)
        else:
            self.network = PTDiTTransformer3DModel(**sizes(settings), **size, caption_channels=caption_channels)
        self.network.register_to_config(sample_frames=frames)
        blocks = self.network.transformer_blocks
        self.middle, self.width = blocks[(len(blocks) - 1) // 2], self.network.proj_out.in_features

    def predict(self, noisy: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        windows = choose_windows(self.network, "auto", "auto", *noisy.shape[-2:])
        return self.network.flow(self.network(noisy, text, timestep, mask, **windows).sample)

    def pipeline(self, **components: Any) -> PTDiTPipeline:
        return PTDiTPipeline(transformer=self.network, **components)


DENOISERS = {"ptdit": PTDiTDenoiser}


def make_denoiser(settings: DenoiserSettings, latent: int, frames: int, caption_channels: int) -> Denoiser:
    """Return the denoiser that the settings name; see `PTDiTDenoiser` for the arguments.

    Raises:
        ValueError: There is none of this name, or the weights to go on from have other sizes.
    """
    if settings.backbone not in DENOISERS:
        raise ValueError(f"model.backbone={settings.backbone!r} is unknown; one of: {', '.join(DENOISERS)}.")
    return DENOISERS[settings.backbone](settings, latent, frames, caption_channels)


def sizes(settings: DenoiserSettings) -> dict[str, int | tuple[int, int, int]]:
    """Return the fields that the configuration of the network has, too."""
    return {name: value for name, value in asdict(settings).items() if name not in ("backbone", "start")}


def check_sizes(settings: DenoiserSettings, network: ModelMixin) -> None:
    """Raise ValueError where weights to go on from have other sizes than the settings."""
    for name, value in sizes(settings).items():
        found = getattr(network.config, name)
        if found not in (value, list(value) if isinstance(value, tuple) else value):
            raise ValueError(f"model.{name}={value} but {settings.start} has {name}={found}; set it to that.")
