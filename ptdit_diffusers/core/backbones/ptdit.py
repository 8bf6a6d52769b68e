"""PT-DiT (arXiv 2409.04005 v2): the block, the whole network, and the sign of its prediction.

Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, M proxies,
L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import AdaLayerNormSingle, Embedder, PatchEmbed, position_table, unpatchify
from .fused import apply_product, check_linear, fused_cross_attention, gated_product, linear_product
from .layers import Attention, FeedForward, layer_norm, modulated_norm, scaled_dot_product
from .parameters import PTDiTParameters
from .proxies import ProxyPlan, SharedProxies, legal_proxy_mode, proxy_index, random_numbers
from .shares import Share
from .windows import Triple, Windows, keep_windows, legal_triple


@dataclass(frozen=True)
class BlockContext:
    """What the blocks of one forward share besides tokens, text and modulation.

    Attributes:
        proxies: which tokens each proxy stands for.
        proxy_index: token indices (B or 1, M) of single-token proxies; None makes proxies as means.
        windows: windows of the token grid.
        shifted_windows: windows shifted by half a window; None in models without them.
        text_mask: bool (B, L), True = keep; None if all text tokens are kept.
    """

    proxies: ProxyPlan | SharedProxies
    proxy_index: Tensor | None
    windows: Windows
    shifted_windows: Windows | None
    text_mask: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "BlockContext":
        """Return the same context on another device; accelerate and offloading call it with a block's other inputs."""
        names = ("proxy_index", "windows", "shifted_windows", "text_mask")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: each.to(device, non_blocking=non_blocking) for name, each in present.items()})


class PTDiTBlock(nn.Module):
    """One block: proxy attention, injection, window and shifted-window attention, text cross-attention, feed-forward.

    Names of layers are the checkpoint's. `proxy_attn1` is the attention among proxies; `pvisual_attn2` the injection,
    in which every token attends to all proxies, with `linear_1_visual` after it, which starts at zero; `attn1` works
    inside windows, `attn3` inside shifted windows with `linear_2` after it, which starts at zero; `attn2` attends to
    the text.
    """

    def __init__(
        self, dim: int, shift_window: bool, attention_layer: Callable, operations: Any, device: Any, dtype: Any
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.proxy_attn1 = attention_layer()
        self.pvisual_attn2 = attention_layer(is_cross_attention=True)
        self.linear_1_visual = operations.Linear(dim, dim, **factory)
        self.attn1 = attention_layer()
        self.shift_window = shift_window
        if shift_window:
            self.attn3 = attention_layer()
            self.linear_2 = operations.Linear(dim, dim, **factory)
            self.proxy_scale_shift_table = nn.Parameter(torch.empty(3, dim, **factory))
        self.attn2 = attention_layer(is_cross_attention=True)
        self.ff = FeedForward(dim, operations, **factory)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim, **factory))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, modulation: Tensor, context: BlockContext
    ) -> Tensor:
        """Return the new tokens (B, N, D) from tokens, text (B, L, D) and modulation (B or 1, 6, D)."""
        table = self.scale_shift_table.to(hidden_states) + modulation  # (B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # (B, 1, D) each

        proxy_tokens = self.proxy_attention(context.proxies.tokens(hidden_states, context.proxy_index))  # (B, M, D)
        hidden_states = self.injection(hidden_states, proxy_tokens)
        hidden_states = self.window_attention(hidden_states, shift1, scale1, gate1, context.windows)
        if self.shift_window:
            table = self.proxy_scale_shift_table.to(hidden_states) + modulation[:, :3]
            shift3, scale3, gate3 = table.chunk(3, dim=1)
            hidden_states = self.shifted_window_attention(
                hidden_states, shift3, scale3, gate3, context.shifted_windows
            )
        hidden_states = self.text_cross_attention(hidden_states, encoder_hidden_states, context.text_mask)
        return torch.addcmul(hidden_states, gate2, self.ff(modulated_norm(hidden_states, shift2, scale2)))

    def proxy_attention(self, proxy_tokens: Tensor) -> Tensor:
        """Let proxies attend to each other: (B, M, D)."""
        return proxy_tokens + self.proxy_attn1(layer_norm(proxy_tokens))

    def injection(self, hidden_states: Tensor, proxy_tokens: Tensor) -> Tensor:
        """Let every token attend to all proxies (visual cross-attention): (B, N, D)."""
        query, source = layer_norm(hidden_states), layer_norm(proxy_tokens)
        if self.fused:
            product = self.injection_weight, self.injection_bias
            return hidden_states + fused_cross_attention(self.pvisual_attn2, query, source, None, *product)
        return hidden_states + self.linear_1_visual(self.pvisual_attn2(query, source))

    def window_attention(
        self, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, windows: Windows
    ) -> Tensor:
        """Let tokens attend to the others of their window: (B, N, D)."""
        inner, source = self.window_inputs(hidden_states, shift, scale, windows)
        return torch.addcmul(hidden_states, gate, windows.restore(self.attn1(inner, source, windows=windows)))

    def window_inputs(
        self, hidden_states: Tensor, shift: Tensor, scale: Tensor, windows: Windows
    ) -> tuple[Tensor, Tensor | None]:
        """Return the modulated tokens in window order: own ones, and all of the windows where those are more."""
        keys = windows.keys(hidden_states)
        source = None if keys is None else modulated_norm(keys, shift, scale)
        return modulated_norm(windows.partition(hidden_states), shift, scale), source

    def shifted_window_attention(
        self, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, windows: Windows
    ) -> Tensor:
        """Let tokens attend to the others of their shifted window; the gate comes before `linear_2`: (B, N, D)."""
        inner, source = self.window_inputs(hidden_states, shift, scale, windows)
        first, tokens = self.attn3.to_out[0], hidden_states.shape[0] * hidden_states.shape[1]
        product = gated_product(first, gate, self.linear_2, tokens) if self.fused else None
        if product is None:
            inner = self.linear_2(gate * self.attn3(inner, source, windows=windows))
        else:
            out = partial(apply_product, weight=product[0], bias=product[1])
            inner = self.attn3(inner, source, windows=windows, out=out)
        return hidden_states + windows.restore(inner)

    def text_cross_attention(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor | None
    ) -> Tensor:
        """Let every token attend to the text: (B, N, D)."""
        arguments = hidden_states, encoder_hidden_states, text_mask
        if self.fused:
            out = self.attn2.to_out[0]
            return hidden_states + fused_cross_attention(self.attn2, *arguments, out.weight, out.bias)
        return hidden_states + self.attn2(*arguments)

    @property
    def fused(self) -> bool:
        """Whether linear layers that follow one another are multiplied, see `fuse`."""
        return "injection_weight" in self._buffers

    def check_linear_layers(self) -> None:
        """Check that the layers which `fuse` multiplies are plain.

        Raises:
            ValueError: see `check_linear`.
        """
        names = ["linear_1_visual", "pvisual_attn2.to_q", "pvisual_attn2.to_out.0", "attn2.to_q", "attn2.to_out.0"]
        for name in [*names, "attn3.to_out.0", "linear_2"] if self.shift_window else names:
            check_linear(name, self.get_submodule(name))

    def fuse(self) -> None:
        """Multiply linear layers that follow one another, see `PTDiTBackbone.fuse_linear_layers`."""
        product = linear_product(self.pvisual_attn2.to_out[0], self.linear_1_visual)
        for name, value in zip(("injection_weight", "injection_bias"), product, strict=True):
            self.register_buffer(name, value, persistent=False)

    def unfuse(self) -> None:
        """Undo `fuse`."""
        if self.fused:
            del self.injection_weight, self.injection_bias  # an empty buffer would stop accelerate's offloading


class PTDiTBackbone(nn.Module):
    """The network without the conventions of a host: a host calls `build` in its constructor, then `predict`."""

    def build(
        self,
        parameters: PTDiTParameters,
        operations: Any = nn,
        attention: Callable = scaled_dot_product,
        attention_class: type[Attention] = Attention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers under the official checkpoint's names.

        Args:
            parameters: sizes and settings.
            operations: namespace with the classes Linear and Conv2d.
            attention: callable like `scaled_dot_product`.
            attention_class: module around it.
            device, dtype: where and in which format weights are made.
        """
        dim = parameters.dim
        self.patch_size = parameters.patch_size
        self.in_channels, self.out_channels = parameters.in_channels, parameters.out_channels
        self.sample_frames, self.round_timestep = parameters.sample_frames, parameters.round_timestep
        self.position_scale = max(parameters.sample_size // 64, 1)
        self.scrambled_positions = parameters.scrambled_positions
        self.additional_conditions = parameters.additional_conditions
        self.num_windows, self.shift_window = parameters.num_windows, parameters.shift_window
        self.trained_windows = parameters.window_size, parameters.proxy_ratio
        self.proxy_mode = parameters.proxy_mode
        self.reset_windows()

        layers = {"operations": operations, "device": device, "dtype": dtype}

        def attention_layer(is_cross_attention: bool = False) -> Attention:
            layer = attention_class(dim, parameters.num_attention_heads, attention, **layers)
            layer.is_cross_attention = is_cross_attention
            return layer

        self.pos_embed = PatchEmbed(self.patch_size, self.in_channels, dim, **layers)
        self.adaln_single = AdaLayerNormSingle(dim, self.additional_conditions, **layers)
        self.caption_projection = Embedder(parameters.caption_channels, dim, nn.GELU(approximate="tanh"), **layers)
        self.transformer_blocks = nn.ModuleList(
            PTDiTBlock(dim, self.shift_window, attention_layer, **layers) for _ in range(parameters.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.proj_out = operations.Linear(dim, self.patch_size**2 * self.out_channels, device=device, dtype=dtype)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give weights the initial values of the official model.

        | weights | value |
        | --- | --- |
        | linear_1_visual, linear_2 of blocks; linear_2 of the size embedders (weight, bias) | 0 |
        | scale_shift_table, proxy_scale_shift_table | N(0, 1) / sqrt(D) |
        | all others | torch's defaults, sampled when the layers are made |
        """
        for block in self.transformer_blocks:
            for name in ("linear_1_visual", "linear_2"):
                layer = getattr(block, name, None)
                if layer is not None:
                    layer.weight.zero_()
                    layer.bias.zero_()
        if self.additional_conditions:
            for embedder in (self.adaln_single.emb.resolution_embedder, self.adaln_single.emb.aspect_ratio_embedder):
                embedder.linear_2.weight.zero_()
                embedder.linear_2.bias.zero_()
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)

    def set_windows(
        self,
        window_size: Triple | None = None,
        proxy_ratio: Triple | None = None,
        proxy_mode: str | None = None,
    ) -> None:
        """Change window size, proxy ratio or proxy mode of a loaded model; no weight depends on them.

        The change holds for this object: the saved configuration keeps what the weights were trained with.

        Args:
            window_size: tokens per window (frames, rows, columns); None keeps the present value.
            proxy_ratio: tokens per proxy (frames, rows, columns). Finer than the window: several strided proxies per
                window (in time always one). Coarser: proxies average over boxes larger than a window.
            proxy_mode: "mean" (v2 of the paper, the released weights), "random" (v1: one random token of each set,
                another in each block) or "first".

        Raises:
            ValueError: a triple is not three integers >= 1, or the mode is unknown.
        """
        window = self.window_size if window_size is None else legal_triple("window_size", window_size)
        ratio = self.proxy_ratio if proxy_ratio is None else legal_triple("proxy_ratio", proxy_ratio)
        mode = self.proxy_mode if proxy_mode is None else legal_proxy_mode(proxy_mode)
        self.window_size, self.proxy_ratio, self.proxy_mode = window, ratio, mode
        self.windows_were_set |= window_size is not None or proxy_ratio is not None

    def reset_windows(self) -> None:
        """Go back to the trained window size and proxy ratio."""
        self.window_size, self.proxy_ratio = self.trained_windows
        self.windows_were_set = False

    def auto_windows(self, height: int, width: int) -> tuple[Triple, Triple]:
        """Return the window size and proxy ratio that keep the trained number of windows (paper, section 3.2.3).

        Args:
            height, width: latent size.

        Returns:
            window size and proxy ratio for that size; the trained values at the trained size. Time is left alone.
            Where no near-square window gives the trained number exactly, the one that comes nearest.
        """
        return keep_windows(
            height // self.patch_size, width // self.patch_size, *self.trained_windows, self.num_windows
        )

    def fuse_linear_layers(self) -> None:
        """Multiply linear layers that follow one another: the same results up to rounding, with less work.

        For inference; at official width and 1024 px it saves 3.3 of 22 D^2 products per token. The output layer and
        `linear_1_visual` of the injection become one; cross-attentions with few keys fold their query layer into the
        keys and their output layer into the values; `linear_2 * gate * to_out` of the shifted windows becomes one.
        Weights and `state_dict` stay as they are; D^2 numbers per block are added. Call it again after a change of
        weights, and after merging a LoRA; `unfuse_linear_layers` undoes it.

        Raises:
            ValueError: a weight is quantized, stored in 8 bits or not loaded, or has a LoRA that is not merged.
        """
        for block in self.transformer_blocks:
            block.check_linear_layers()
        for block in self.transformer_blocks:
            block.fuse()

    def unfuse_linear_layers(self) -> None:
        """Undo `fuse_linear_layers`."""
        for block in self.transformer_blocks:
            block.unfuse()

    def run_block(
        self,
        block: PTDiTBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        context: BlockContext,
    ) -> Tensor:
        """Call one block; hosts override it, for example for gradient checkpointing."""
        return block(hidden_states, encoder_hidden_states, modulation, context)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        window_size: Triple | None = None,
        proxy_ratio: Triple | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        proxy_mode: str | None = None,
        round_timestep: bool | None = None,
    ) -> Tensor:
        """Predict x0 - noise, see `flow`.

        Args:
            latents: (B, C, F, height, width), height and width multiples of the patch size.
            timestep: (B,) in 0..1000, one per sample; one number, (1,) or expanded, is embedded once for all.
            encoder_hidden_states: (B, L, caption channels).
            encoder_attention_mask: bool (B, L), True = keep; None if all are kept.
            resolution, aspect_ratio: (B, 2), (B, 1); only for models with additional conditions.
            window_size, proxy_ratio, proxy_mode, round_timestep: for this call only; None keeps the model's.
            generator: chooses the proxies of mode "random"; a list has one per sample, see `random_numbers`.

        Returns:
            (B, out channels, F, height, width); channels after the first `in_channels` are untrained.
        """
        if self.round_timestep if round_timestep is None else round_timestep:
            timestep = timestep.to(latents.dtype)
        timestep = timestep.reshape(-1)[:1] if timestep.ndim == 0 or timestep.stride(0) == 0 else timestep
        window = self.window_size if window_size is None else legal_triple("window_size", window_size)
        ratio = self.proxy_ratio if proxy_ratio is None else legal_triple("proxy_ratio", proxy_ratio)
        mode = self.proxy_mode if proxy_mode is None else legal_proxy_mode(proxy_mode)
        batch, _, frames, height, width = latents.shape
        grid = (frames, height // self.patch_size, width // self.patch_size)

        plan = ProxyPlan(grid, window, ratio)
        share = self.share_of(plan)
        if share is not None:
            latents = share.narrow(latents, 2, 1 if share.axis == 0 else self.patch_size)
        hidden_states = self.pos_embed(latents)  # (B, N, D)
        dim, dtype, device = hidden_states.shape[-1], hidden_states.dtype, latents.device
        positions = position_table(grid, dim, self.position_scale, self.scrambled_positions, device)
        if share is not None:
            positions = share.narrow(positions.unflatten(0, grid), 0).flatten(0, 2)
        hidden_states = (hidden_states + positions).to(dtype)
        embedded, modulation = self.adaln_single(timestep, resolution, aspect_ratio, dtype)  # (B, D), (B, 6, D)
        text = self.caption_projection(encoder_hidden_states.to(dtype))  # (B, L, D)

        context = BlockContext(
            proxies=plan if share is None else SharedProxies(plan, share),
            proxy_index=proxy_index(*plan, None, device) if mode == "first" else None,
            windows=Windows(grid, window, False, device, share),
            shifted_windows=Windows(grid, window, True, device, share) if self.shift_window else None,
            text_mask=encoder_attention_mask,
        )
        for block in self.transformer_blocks:
            if mode == "random":  # other proxies in each block; chosen here, so that checkpointing sees the same again
                uniform = random_numbers(batch, plan.number(), generator, device)
                context = replace(context, proxy_index=proxy_index(*plan, uniform, device))
            hidden_states = self.run_block(block, hidden_states, text, modulation, context)

        shift, scale = (self.scale_shift_table.to(hidden_states) + embedded[:, None]).chunk(2, dim=1)  # (B, 1, D)
        patches = self.proj_out(modulated_norm(hidden_states, shift, scale))  # (B, N, p*p*C)
        patches = patches if share is None else share.whole(patches)
        return unpatchify(patches, grid, self.patch_size)

    def share_of(self, plan: ProxyPlan) -> Share | None:
        """Return what this device owns of a token grid; None: all of it. Hosts with several devices override it."""
        return None

    def flow(self, sample: Tensor) -> Tensor:
        """Return the velocity noise - x0 in float32, (B, in channels, F, height, width), from `predict`'s output.

        The network predicts x0 - noise in its first `in_channels` channels. Flow-matching schedulers step along the
        opposite sign, in float32 so that latents are not rounded at each step.
        """
        return -sample[:, : self.in_channels].float()
