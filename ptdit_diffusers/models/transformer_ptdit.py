"""diffusers head of the backbone: configuration, attention processors, mixins. No maths of its own."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale

from ptdit_diffusers.core.backbones.layers import Attention
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone, PTDiTBlock
from ptdit_diffusers.core.backbones.windows import Triple, Windows

SPLIT_TOKENS = {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
GATHER_TOKENS = ContextParallelOutput(gather_dim=1, expected_dims=3)


class SharedWindows:
    """Windows over tokens of which each device of a context-parallel group holds a part.

    A device's tokens may begin and end inside a window. So devices trade tokens for heads before the attention
    (Ulysses), each attends with its share of the heads in all windows, and they trade back.

    Raises:
        ValueError: the number of devices does not divide the heads, or the parts are not equal.
    """

    def __init__(self, windows: Windows, heads: int, parallel: ContextParallelConfig):
        devices = parallel.ring_degree * parallel.ulysses_degree
        if heads % devices:
            legal = max(part for part in range(1, devices) if heads % part == 0)
            raise ValueError(f"{heads} heads cannot be shared by {devices} devices; nearest smaller number: {legal}.")
        if parallel.ulysses_anything or parallel.ring_anything:
            raise ValueError(
                "ulysses_anything and ring_anything make unequal parts, which windows cannot use; drop it."
            )
        self.windows = windows
        self.group = parallel._flattened_mesh.get_group()

    def attend(self, attention: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `Windows.attend`, of this device's part (B, N / devices, heads, head_dim)."""
        query, key, value = (SeqAllToAllDim.apply(self.group, tokens) for tokens in (query, key, value))
        return SeqAllToAllDim.apply(self.group, self.windows.attend(attention, query, key, value), 1, 2)


class PTDiTAttnProcessor:
    """Attends through diffusers' dispatcher, so `set_attention_backend` reaches every layer.

    Kernels of the flash kind take no mask: attention to masked text stays with torch's own whatever was chosen.
    Under context parallelism only windows need tokens of other devices: all others have all their keys.
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
        out: Callable | None = None,
    ) -> torch.Tensor:
        backend = self._attention_backend if attention_mask is None else "native"
        attend = partial(dispatch_attention_fn, backend=backend)
        if self._parallel_config is not None and windows is not None:
            windows = SharedWindows(windows, attn.heads, self._parallel_config.context_parallel_config)
        return attn.attend(attend, hidden_states, encoder_hidden_states, attention_mask, windows, out)


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
        out: Callable | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, windows, out)


def only_unfused(method: Callable) -> Callable:
    """A method that a model with fused linear layers refuses: its products would not follow."""

    @wraps(method)
    def checked(self: "PTDiTTransformer3DModel", *args: Any, **kwargs: Any) -> Any:
        if self.transformer_blocks[0].fused:
            raise ValueError(
                f"{method.__name__} changes layers that are fused: call unfuse_linear_layers() first, and "
                "fuse_linear_layers() again afterwards."
            )
        return method(self, *args, **kwargs)

    return checked


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
        round_timestep (`bool`, defaults to `False`): round the time to the format of the latents, as the official code
            does (the weights may have been trained so). In bf16 it then moves in steps of 4 above 512, of 2 above 256.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PTDiTBlock"]
    _repeated_blocks = ["PTDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "adaln_single", "scale_shift_table"]
    _keep_in_fp32_modules = ["scale_shift_table", "proxy_scale_shift_table"]  # small; the forward casts them
    _keys_to_ignore_on_load_unexpected = ["pos_embed.pos_embed"]
    # Windows, shifted windows and proxies need the tokens in three orders, so no one split of the sequence serves a
    # block: the residual stream stays whole on every device, and each layer's tokens are split before and gathered
    # after it.
    _cp_plan = {
        "transformer_blocks.*.pvisual_attn2": SPLIT_TOKENS,
        "transformer_blocks.*.linear_1_visual": GATHER_TOKENS,
        "transformer_blocks.*.attn1": SPLIT_TOKENS,
        "transformer_blocks.*.attn1.to_out.0": GATHER_TOKENS,
        "transformer_blocks.*.attn3": SPLIT_TOKENS,
        "transformer_blocks.*.linear_2": GATHER_TOKENS,
        "transformer_blocks.*.attn2": SPLIT_TOKENS,
        "transformer_blocks.*.attn2.to_out.0": GATHER_TOKENS,
        "transformer_blocks.*.ff": SPLIT_TOKENS,
        "transformer_blocks.*.ff.net.2": GATHER_TOKENS,
    }

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
        round_timestep: bool = False,
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
        if not shift_window:
            shifted = ("attn3", "linear_2")
            self._cp_plan = {name: part for name, part in self._cp_plan.items() if not name.endswith(shifted)}

    load_lora_adapter = only_unfused(PeftAdapterMixin.load_lora_adapter)
    add_adapter = only_unfused(PeftAdapterMixin.add_adapter)
    fuse_lora = only_unfused(PeftAdapterMixin.fuse_lora)
    unfuse_lora = only_unfused(PeftAdapterMixin.unfuse_lora)
    set_adapter = only_unfused(PeftAdapterMixin.set_adapter)
    set_adapters = only_unfused(PeftAdapterMixin.set_adapters)
    enable_adapters = only_unfused(PeftAdapterMixin.enable_adapters)
    disable_adapters = only_unfused(PeftAdapterMixin.disable_adapters)
    enable_lora = only_unfused(PeftAdapterMixin.enable_lora)
    disable_lora = only_unfused(PeftAdapterMixin.disable_lora)
    delete_adapters = only_unfused(PeftAdapterMixin.delete_adapters)
    unload_lora = only_unfused(PeftAdapterMixin.unload_lora)
    load_state_dict = only_unfused(ModelMixin.load_state_dict)
    enable_parallelism = only_unfused(ModelMixin.enable_parallelism)

    def fuse_linear_layers(self) -> None:
        if self._parallel_config is not None:
            raise ValueError("linear layers cannot be fused under context parallelism, which splits their tokens.")
        super().fuse_linear_layers()

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
        if torch.is_grad_enabled() and self.transformer_blocks[0].fused:
            raise ValueError(
                "fused linear layers are for inference: call the model under torch.no_grad(), or "
                "unfuse_linear_layers() first."
            )
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()
        if self.config.round_timestep:
            timestep = timestep.to(hidden_states.dtype)
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
