"""diffusers head of the backbone: configuration, attention processors, mixins. No maths of its own."""

from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale

from .ptdit_backbone import Attention, PTDiTBackbone, PTDiTBlock
from .ptdit_grid import Triple, Windows


class PTDiTAttnProcessor:
    """Attends through diffusers' dispatcher, so `set_attention_backend` reaches every layer.

    Kernels of the flash kind take no mask: attention to masked text stays with torch's own whatever was chosen.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "PTDiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        windows: Windows | None = None,
    ) -> torch.Tensor:
        backend = self._attention_backend if attention_mask is None else "native"
        attend = partial(dispatch_attention_fn, backend=backend)
        return attn.attend(attend, hidden_states, encoder_hidden_states, attention_mask, windows)


class PTDiTAttention(Attention, AttentionModuleMixin):
    """The backbone's attention behind a diffusers processor; fused projections are honoured."""

    _default_processor_cls = PTDiTAttnProcessor
    _available_processors = [PTDiTAttnProcessor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.use_bias = True
        self.is_cross_attention = False
        self.fused_projections = False
        self.set_processor(PTDiTAttnProcessor())

    def project(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.fused_projections:
            return super().project(hidden_states, encoder_hidden_states)
        if encoder_hidden_states is None:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), *self.to_kv(encoder_hidden_states).chunk(2, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        windows: Windows | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, windows)


class PTDiTTransformer3DModel(
    ModelMixin, PTDiTBackbone, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin, AttentionMixin
):
    """PT-DiT, the proxy-tokenized diffusion transformer of Qihoo-T2X (arXiv 2409.04005), for pictures and videos.

    Defaults are the released 1.13 B text-to-image checkpoint.

    Args:
        num_attention_heads (`int`, defaults to 16): heads of every attention.
        attention_head_dim (`int`, defaults to 72): width of a head; heads * width must be a multiple of 16.
        in_channels (`int`, defaults to 4): latent channels.
        out_channels (`int`, defaults to 8): channels of the output; only the first `in_channels` are trained.
        num_layers (`int`, defaults to 28): number of blocks.
        patch_size (`int`, defaults to 2): latent pixels per token side, in space only.
        sample_size (`int`, defaults to 32): latent size of the position table's unit; rows and columns count
            `max(sample_size // 64, 1)` to one unit.
        sample_frames (`int`, defaults to 1): latent frames that the checkpoint was made for.
        caption_channels (`int`, defaults to 4096): width of the text encoder's output.
        window_size (`tuple`, defaults to (1, 8, 8)): tokens per window (frames, rows, columns).
        proxy_ratio (`tuple`, defaults to (1, 8, 8)): tokens per proxy (frames, rows, columns), see `set_windows`.
        shift_window (`bool`, defaults to `True`): blocks have a shifted-window attention.
        proxy_mode (`str`, defaults to "mean"): "mean", "random" or "first", see `set_windows`.
        num_windows (`int`, defaults to 64): windows per frame at the trained size; `auto_windows` keeps it.
        scrambled_positions (`bool`, defaults to `False`): on non-square pictures, use the positions that the official
            code computes by mistake (the weights may have been trained with them).
        use_additional_conditions (`bool`, *optional*): embed resolution and aspect ratio; by default only when
            `sample_size` is 128, as in the official code.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PTDiTBlock"]
    _repeated_blocks = ["PTDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "adaln_single", "scale_shift_table"]
    _keys_to_ignore_on_load_unexpected = ["pos_embed.pos_embed"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        patch_size: int = 2,
        sample_size: int = 32,
        sample_frames: int = 1,
        caption_channels: int = 4096,
        window_size: tuple[int, int, int] = (1, 8, 8),
        proxy_ratio: tuple[int, int, int] = (1, 8, 8),
        shift_window: bool = True,
        proxy_mode: str = "mean",
        num_windows: int = 64,
        scrambled_positions: bool = False,
        use_additional_conditions: bool | None = None,
    ):
        super().__init__()
        additional = sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        self.build(
            num_attention_heads,
            attention_head_dim,
            in_channels,
            out_channels,
            num_layers,
            patch_size,
            sample_size,
            caption_channels,
            window_size,
            proxy_ratio,
            shift_window,
            proxy_mode,
            num_windows,
            scrambled_positions,
            additional,
            attention_class=PTDiTAttention,
        )
        self.initialize_weights()
        self.gradient_checkpointing = False

    def run_block(self, block: PTDiTBlock, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        resolution: torch.Tensor | None = None,
        aspect_ratio: torch.Tensor | None = None,
        window_size: Triple | None = None,
        proxy_ratio: Triple | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts x0 - noise in the first `in_channels` channels; `flow` turns it into what a scheduler steps on.

        Args:
            hidden_states (`torch.Tensor` of shape (B, C, F, H, W)): noisy latents.
            encoder_hidden_states (`torch.Tensor` of shape (B, L, caption_channels)): text.
            timestep (`torch.Tensor` of shape (B,)): time of each sample in 0..1000; it may be fractional.
            encoder_attention_mask (`torch.Tensor` of shape (B, L), *optional*): 1 or True = keep; leave it out when
                nothing is masked, so that fast attention kernels can run.
            resolution, aspect_ratio (`torch.Tensor` of shape (B, 2) and (B, 1), or for all samples (1, 2) and (1, 1),
                *optional*): only for models with additional conditions, which need both.
            window_size, proxy_ratio (`tuple`, *optional*): for this call only; by default the model's present ones.
            generator (`torch.Generator` or list of them, *optional*): draws the proxies of `proxy_mode="random"`; of a
                list, sample i uses generator i, and a list shorter than the batch is repeated.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales the LoRA.
            return_dict (`bool`, defaults to `True`): return a `Transformer2DModelOutput`, else a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` of shape (B, out_channels, F, H, W).
        """
        if hidden_states.ndim != 5:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; it must be (batch, channels, frames, height, "
                "width), a picture being one frame: unsqueeze(2)."
            )
        for name, size in zip(("height", "width"), hidden_states.shape[-2:], strict=True):
            if size % self.patch_size:
                low = size // self.patch_size * self.patch_size
                raise ValueError(
                    f"latent {name}={size} is not a multiple of the patch size {self.patch_size}; "
                    f"nearest: {low or self.patch_size} or {low + self.patch_size}."
                )
        if self.additional_conditions and (resolution is None or aspect_ratio is None):
            raise ValueError("this model needs `resolution` (B, 2) and `aspect_ratio` (B, 1); got None.")
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()
        sample = self.denoise(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            resolution,
            aspect_ratio,
            window_size,
            proxy_ratio,
            generator,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
