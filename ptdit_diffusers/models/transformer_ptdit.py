"""diffusers model of PT-DiT: configuration, mixins, checks of inputs; the network is `core.backbones.ptdit`."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters
from ptdit_diffusers.core.backbones.proxies import ProxyPlan, SharedProxies
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone, PTDiTBlock
from ptdit_diffusers.core.backbones.shares import Share, best_plan
from ptdit_diffusers.core.backbones.windows import Triple

from .attention_ptdit import PTDiTAttention

logger = logging.getLogger(__name__)

CACHES_OF_STEPS = (  # of diffusers: they skip by the number of the step, the time or the whole latents
    "MagCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "SeaCacheConfig",
    "FasterCacheConfig",
)


def only_unfused(*names: str) -> Callable[[type], type]:
    """Make a class decorator for methods that change layers: a model with fused linear layers refuses them.

    The fused products would not follow the change.
    """

    def wrap(name: str, method: Callable) -> Callable:
        @wraps(method)
        def checked(self: "PTDiTTransformer3DModel", *args: Any, **kwargs: Any) -> Any:
            if self.transformer_blocks[0].fused:
                raise ValueError(
                    f"{name} changes layers that are fused: call unfuse_linear_layers() first, and "
                    "fuse_linear_layers() again afterwards."
                )
            return method(self, *args, **kwargs)

        return checked

    def decorate(cls: type) -> type:
        for name in names:
            setattr(cls, name, wrap(name, getattr(cls, name)))
        return cls

    return decorate


@only_unfused(
    "load_lora_adapter",
    "add_adapter",
    "fuse_lora",
    "unfuse_lora",
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
    "unload_lora",
    "load_state_dict",
)
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
        sample_size (`int`, defaults to 32): latent size that sets the unit of positions:
            `max(sample_size // 64, 1)` rows or columns.
        sample_frames (`int`, defaults to 1): latent frames that the weights were trained for.
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
        round_timestep (`bool`, defaults to `False`): round the timestep to the dtype of the latents, as the official
            code does (the weights may have been trained so): in bf16 to steps of 4 above 512, of 2 above 256.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PTDiTBlock"]
    _repeated_blocks = ["PTDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "adaln_single", "scale_shift_table"]
    _keep_in_fp32_modules = ["scale_shift_table", "proxy_scale_shift_table"]  # small; the forward casts them
    _keys_to_ignore_on_load_unexpected = ["pos_embed.pos_embed"]
    _cp_plan = {}  # diffusers installs nothing: the backbone shares its tokens itself

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
        window_size: Triple = (1, 8, 8),
        proxy_ratio: Triple = (1, 8, 8),
        shift_window: bool = True,
        proxy_mode: str = "mean",
        num_windows: int = 64,
        scrambled_positions: bool = False,
        use_additional_conditions: bool | None = None,
        round_timestep: bool = False,
    ):
        super().__init__()
        self.build(PTDiTParameters.from_config(self.config), attention_class=PTDiTAttention)
        self.initialize_weights()
        self.gradient_checkpointing = False
        self._messages = None  # how devices that share the tokens reach each other
        self.everyone = None  # how all devices of a call do
        self.guidance_halves = None  # how the two devices do that have the same tokens, and other texts
        self._shares: dict[ProxyPlan, Share] = {}  # of the shapes that this device has seen

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "PTDiTTransformer3DModel":
        """Load as every model of diffusers; `parallel_config` may be a `ContextParallelConfig`, too.

        diffusers 0.42 documents that and then reads an attribute of the other class.
        """
        if hasattr(shared := kwargs.get("parallel_config"), "ulysses_degree"):
            from diffusers import ParallelConfig  # with torch.distributed, which builds may lack

            kwargs["parallel_config"] = ParallelConfig(context_parallel_config=shared)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Share the tokens of every forward among the processes of torch.distributed.

        Each owns some slices of one axis, whole windows where they divide well. Per block only proxies and tokens of
        windows at the borders of shares travel. All processes must call the model with the same inputs.

        Args:
            config: a `ContextParallelConfig` of diffusers; ring and Ulysses degrees mean the same here, and their
                product is the number of devices.
            cp_plan: not used by this model.

        Raises:
            ValueError: `cp_plan` or tensor parallelism is given, the degrees are not those of the processes, or a
                cache is enabled that would decide differently on each device.
            RuntimeError: parallelism is on already, or torch.distributed is not initialized.
        """
        if cp_plan is not None:
            raise ValueError("cp_plan is not used by PT-DiT, which shares whole windows: leave it out.")
        self.check_devices()
        shared, count = getattr(config, "context_parallel_config", config), torch.distributed.get_world_size()
        if not hasattr(shared, "ulysses_degree"):
            raise ValueError(
                f"{type(config).__name__}: PT-DiT shares tokens, not weights; nearest: "
                f"ContextParallelConfig(ulysses_degree={count})."
            )
        if shared.mesh is None and shared.ring_degree * shared.ulysses_degree != count:
            raise ValueError(
                f"ring_degree={shared.ring_degree} x ulysses_degree={shared.ulysses_degree} is not the number of "
                f"processes, {count}; nearest: ulysses_degree={count}, or a mesh that says which processes share."
            )
        from diffusers import ParallelConfig  # with torch.distributed, which builds may lack

        from .parallel_ptdit import make_mesh

        self.join_devices(shared.mesh or make_mesh(shared.mesh_shape, shared.mesh_dim_names))
        self._parallel_config = ParallelConfig(context_parallel_config=shared)

    def check_devices(self) -> None:
        """Raise RuntimeError unless processes can begin to share the model's work."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialized: start the processes with torchrun, and call "
                "torch.distributed.init_process_group() before enable_parallelism()."
            )
        if self.everyone is not None:
            raise RuntimeError("parallelism is on already: call enable_parallelism() once.")

    def join_devices(self, mesh: Any) -> None:
        """Take the groups of a device mesh: those who share tokens, and with an axis "guidance" the two halves.

        Args:
            mesh: with axes "ring" and "ulysses".

        Raises:
            ValueError: a cache is enabled that does not go with it.
        """
        from .parallel_ptdit import GUIDANCE, GroupMessages  # with torch.distributed, which builds may lack

        sharing, halves = mesh["ring", "ulysses"], GUIDANCE in mesh.mesh_dim_names
        refuse_cache(self._cache_config, sharing.size() > 1, halves)
        self.everyone = GroupMessages(torch.distributed.group.WORLD)
        if sharing.size() > 1:
            self._messages = GroupMessages(sharing._flatten().get_group())
        if halves:
            self.guidance_halves = GroupMessages(mesh[GUIDANCE].get_group())
            logger.info(
                "device %d of %d predicts for the %s",
                self.everyone.rank + 1,
                self.everyone.count,
                ("negative prompt", "prompt")[self.guidance_halves.rank],
            )

    def enable_cache(self, config: Any) -> None:
        """Enable a cache of diffusers, see `CacheMixin`.

        Raises:
            ValueError: devices share the work, and would decide differently what to skip.
        """
        refuse_cache(config, self._messages is not None, self.guidance_halves is not None)
        super().enable_cache(config)

    def share_of(self, plan: ProxyPlan) -> Share | None:
        if self._messages is None:
            return None
        if plan not in self._shares:
            dim = self.config.num_attention_heads * self.config.attention_head_dim
            best = best_plan(plan.grid, plan.window, self.shift_window, plan.number(), dim, self._messages.count)
            self._shares[plan] = Share(plan.grid, best.axis, best.bounds, self._messages)
            if not torch.compiler.is_compiling():
                self._say_share(SharedProxies(plan, self._shares[plan]), dim)
        return self._shares[plan]

    def _say_share(self, proxies: SharedProxies, dim: int) -> None:
        """Say once for each shape what this device owns, and the bytes that it receives in a block for each sample."""
        share, axis = proxies.share, ("frames", "rows", "columns")[proxies.share.axis]
        vectors, (start, stop) = proxies.received(self.shift_window), share.span
        logger.info(
            "device %d of %d owns token %s %d to %d of %d (shares begin at %s), and receives %.2f MB per block and "
            "sample: %d vectors of %d numbers, %s",
            share.messages.rank + 1,
            share.messages.count,
            axis,
            start,
            stop - 1,
            share.bounds[-1],
            " ".join(map(str, share.bounds[:-1])),
            vectors * dim * self.dtype.itemsize / 1e6,
            vectors,
            dim,
            str(self.dtype).removeprefix("torch."),
        )

    def run_block(self, block: PTDiTBlock, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        window_size: Triple | None = None,
        proxy_ratio: Triple | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict x0 - noise in the first `in_channels` channels; `flow` turns it into what a scheduler steps on.

        Args:
            hidden_states (`torch.Tensor` of shape (B, C, F, H, W)): noisy latents.
            encoder_hidden_states (`torch.Tensor` of shape (B, L, caption_channels)): text.
            timestep (`torch.Tensor` of shape (B,)): time of each sample in 0..1000; it may be fractional.
            encoder_attention_mask (`torch.Tensor` of shape (B, L), *optional*): 1 or True = keep; leave it out when
                nothing is masked, so that fast attention kernels can run.
            resolution, aspect_ratio (`torch.Tensor` of shape (B, 2) and (B, 1), or for all samples (1, 2) and (1, 1),
                *optional*): only for models with additional conditions, which need both.
            window_size, proxy_ratio (`tuple`, *optional*): for this call only; by default the model's present ones.
            generator (`torch.Generator` or list of them, *optional*): chooses the proxies of `proxy_mode="random"`. Of
                a list, sample i uses generator i, and a list shorter than the batch is repeated.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales the LoRA.
            return_dict (`bool`, defaults to `True`): return a `Transformer2DModelOutput`, else a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` of shape (B, out_channels, F, H, W).
        """
        self._check_inputs(hidden_states, resolution, aspect_ratio)
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()
        sample = self.predict(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            resolution,
            aspect_ratio,
            window_size,
            proxy_ratio,
            generator,
            round_timestep=self.config.round_timestep,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(self, hidden_states: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> None:
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
        if self.transformer_blocks[0].fused and _comes_alone(self.transformer_blocks[0].attn2.to_q):
            raise ValueError(
                "fused linear layers read each other's weights, which are not there when layers are offloaded one by "
                'one: call unfuse_linear_layers(), or offload by blocks or whole models (offload_type="block_level").'
            )
        if torch.is_grad_enabled() and self.transformer_blocks[0].fused:
            raise ValueError(
                "fused linear layers are for inference: call the model under torch.no_grad(), or "
                "unfuse_linear_layers() first."
            )


def refuse_cache(config: Any, shares_tokens: bool, halves_guidance: bool) -> None:
    """Refuse a cache by which devices that share a forward would skip different work, and wait for ever.

    Args:
        config: of the cache; None is none.
        shares_tokens: each device sees its own tokens only.
        halves_guidance: each device sees one of the two predictions only.

    Raises:
        ValueError: it names the caches that can be used.
    """
    name = type(config).__name__
    if config is not None and shares_tokens and name not in CACHES_OF_STEPS:
        raise ValueError(
            f"{name} decides from tokens what it skips, and each device has others; nearest, by steps or latents: "
            f"{', '.join(CACHES_OF_STEPS)}."
        )
    if name == "FasterCacheConfig" and halves_guidance:
        raise ValueError(
            "FasterCacheConfig needs both predictions in one batch, and guidance_halves=True parts them; nearest: "
            "guidance_halves=False, or PyramidAttentionBroadcastConfig."
        )


def _comes_alone(layer: torch.nn.Module) -> bool:
    """Whether offloading by accelerate or diffusers brings the weights of a layer only for its own forward."""
    hooks = getattr(layer, "_diffusers_hook", None)
    return hasattr(layer, "_hf_hook") or (hooks is not None and hooks.get_hook("group_offloading") is not None)
