"""The maths of PT-DiT (arXiv 2409.04005 v2): attention, block, backbone, sign of the prediction.

Plain torch; it knows nothing of diffusers, ComfyUI, files or devices. Layers come from `operations` (a namespace with
Linear and Conv2d), attention from one callable, so that every host builds the same maths with its own layers.
Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, M proxies,
L text tokens, S tokens of one window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import AdaLayerNormSingle, Embedder, PatchEmbed, position_table
from .fused import apply_product, check_linear, fused_cross_attention, gated_product, linear_product
from .layers import Attention, FeedForward, layer_norm, modulated_norm, scaled_dot_product
from .proxies import ProxyPlan, draw_proxies, proxy_index
from .windows import Triple, Windows, keep_windows, legal_triple

PROXY_MODES = ("mean", "random", "first")


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def attend_inside(
    attention: Attention,
    hidden_states: Tensor,
    shift: Tensor,
    scale: Tensor,
    windows: Windows,
    out: Callable | None = None,
) -> Tensor:
    """Modulated self-attention inside windows; the result (B, N, D) is still in their order."""
    inner = modulated_norm(windows.partition(hidden_states), shift, scale)
    return attention(inner, windows=windows, out=out)


class PTDiTBlock(nn.Module):
    """One block: proxy attention, injection, window attention, shifted-window attention, text, feed-forward.

    Names are the checkpoint's. `pvisual_attn2` is the injection (every token queries all proxies), `linear_1_visual`
    its zero-initialised output; `attn1` works inside windows, `attn3` inside shifted windows with the zero-initialised
    `linear_2` after it; `attn2` reads the text.
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
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        encoder_attention_mask: Tensor | None,
        proxies: ProxyPlan,
        windows: Windows,
        shifted_windows: Windows | None,
        index: Tensor | None,
    ) -> Tensor:
        table = self.scale_shift_table.to(hidden_states) + modulation  # (B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # (B, 1, D) each

        proxy_tokens = self.interact(proxies.tokens(hidden_states, index))  # (B, M, D)
        hidden_states = self.inject(hidden_states, proxy_tokens)
        hidden_states = self.window(hidden_states, shift1, scale1, gate1, windows)
        if self.shift_window:
            table = self.proxy_scale_shift_table.to(hidden_states) + modulation[:, :3]
            hidden_states = self.shifted_window(hidden_states, *table.chunk(3, dim=1), shifted_windows)
        hidden_states = self.read(hidden_states, encoder_hidden_states, encoder_attention_mask)
        return torch.addcmul(hidden_states, gate2, self.ff(modulated_norm(hidden_states, shift2, scale2)))

    def interact(self, proxy_tokens: Tensor) -> Tensor:
        """Proxies attend to each other: (B, M, D)."""
        return proxy_tokens + self.proxy_attn1(layer_norm(proxy_tokens))

    def inject(self, hidden_states: Tensor, proxy_tokens: Tensor) -> Tensor:
        """Every token queries all proxies."""
        query, source = layer_norm(hidden_states), layer_norm(proxy_tokens)
        if self.fused:
            product = self.injection_weight, self.injection_bias
            return hidden_states + fused_cross_attention(self.pvisual_attn2, query, source, None, *product)
        return hidden_states + self.linear_1_visual(self.pvisual_attn2(query, source))

    def window(self, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, windows: Windows) -> Tensor:
        """Texture inside windows."""
        inner = attend_inside(self.attn1, hidden_states, shift, scale, windows)
        return torch.addcmul(hidden_states, gate, windows.restore(inner))

    def shifted_window(
        self, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, windows: Windows
    ) -> Tensor:
        """Texture across the borders of windows; the gate comes before the last linear layer."""
        first, tokens = self.attn3.to_out[0], hidden_states.shape[0] * hidden_states.shape[1]
        product = gated_product(first, gate, self.linear_2, tokens) if self.fused else None
        if product is None:
            inner = attend_inside(self.attn3, hidden_states, shift, scale, windows)
            return hidden_states + windows.restore(self.linear_2(gate * inner))
        out = partial(apply_product, weight=product[0], bias=product[1])
        return hidden_states + windows.restore(attend_inside(self.attn3, hidden_states, shift, scale, windows, out))

    def read(self, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Every token queries the text."""
        if self.fused:
            product = self.attn2.to_out[0].weight, self.attn2.to_out[0].bias
            return hidden_states + fused_cross_attention(self.attn2, hidden_states, text, attention_mask, *product)
        return hidden_states + self.attn2(hidden_states, text, attention_mask)

    @property
    def fused(self) -> bool:
        """Whether linear layers that follow one another are multiplied first."""
        return "injection_weight" in self._buffers

    def check_linear_layers(self) -> None:
        """See `PTDiTBackbone.fuse_linear_layers`."""
        names = ["linear_1_visual", "pvisual_attn2.to_q", "pvisual_attn2.to_out.0", "attn2.to_q", "attn2.to_out.0"]
        for name in [*names, "attn3.to_out.0", "linear_2"] if self.shift_window else names:
            check_linear(name, self.get_submodule(name))

    def fuse(self) -> None:
        product = linear_product(self.pvisual_attn2.to_out[0], self.linear_1_visual)
        for name, value in zip(("injection_weight", "injection_bias"), product, strict=True):
            self.register_buffer(name, value, persistent=False)

    def unfuse(self) -> None:
        if self.fused:
            del self.injection_weight, self.injection_bias  # an empty buffer would stop accelerate's offloading


# ---------------------------------------------------------------------------------------------------------------------
# Backbone
# ---------------------------------------------------------------------------------------------------------------------
class PTDiTBackbone(nn.Module):
    """The whole network without any host's manners. A host calls `build` in its constructor, then `denoise`."""

    def build(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        patch_size: int,
        sample_size: int,
        caption_channels: int,
        window_size: Triple,
        proxy_ratio: Triple,
        shift_window: bool,
        proxy_mode: str,
        num_windows: int,
        scrambled_positions: bool,
        additional_conditions: bool,
        operations: Any = nn,
        attention: Callable = scaled_dot_product,
        attention_class: type[Attention] = Attention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the layers under the official checkpoint's keys. Arguments: see `PTDiTTransformer3DModel`.

        `operations` is the namespace of layer classes, `attention` the callable that attends, `attention_class` the
        module around it; hosts replace them by their own.
        """
        dim = num_attention_heads * attention_head_dim
        if dim % 16:
            nearest = max(16, round(dim / 16) * 16)
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 16 (positions); "
                f"nearest: {nearest}."
            )
        if additional_conditions and dim % 3:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 3 with additional conditions "
                f"(sample_size 128); nearest: {round(dim / 48) * 48 or 48}."
            )
        self.patch_size, self.in_channels, self.out_channels = patch_size, in_channels, out_channels
        self.position_scale = max(sample_size // 64, 1)
        self.scrambled_positions, self.additional_conditions = scrambled_positions, additional_conditions
        self.num_windows, self.shift_window = num_windows, shift_window
        self.trained_windows = legal_triple("window_size", window_size), legal_triple("proxy_ratio", proxy_ratio)
        self.reset_windows()
        self.set_windows(proxy_mode=proxy_mode)

        layers = {"operations": operations, "device": device, "dtype": dtype}

        def attention_layer(is_cross_attention: bool = False) -> Attention:
            layer = attention_class(dim, num_attention_heads, attention, **layers)
            layer.is_cross_attention = is_cross_attention
            return layer

        self.pos_embed = PatchEmbed(patch_size, in_channels, dim, **layers)
        self.adaln_single = AdaLayerNormSingle(dim, additional_conditions, **layers)
        self.caption_projection = Embedder(caption_channels, dim, nn.GELU(approximate="tanh"), **layers)
        blocks = [PTDiTBlock(dim, shift_window, attention_layer, **layers) for _ in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.proj_out = operations.Linear(dim, patch_size**2 * out_channels, device=device, dtype=dtype)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initial values of the official model.

        | parameters | value |
        | --- | --- |
        | linear_1_visual, linear_2 of blocks and of the size embedders (weight, bias) | 0 |
        | scale_shift_table, proxy_scale_shift_table | N(0, 1) / sqrt(D) |
        | all others | torch's defaults, drawn by the layers themselves |
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
        """Changes window size, proxy ratio or proxy mode of a loaded model; weights do not depend on them.

        The change holds for this object: the saved configuration keeps what the weights were trained with.

        Args:
            window_size: tokens per window (frames, rows, columns); None keeps the present value.
            proxy_ratio: tokens per proxy (frames, rows, columns). Finer than the window: several strided proxies per
                window (in time always one). Coarser: proxies average over boxes larger than a window.
            proxy_mode: "mean" (v2 of the paper, the released weights), "random" (v1: one token of each set, drawn in
                each block) or "first".

        Raises:
            ValueError: a triple is not three integers >= 1, or the mode is unknown.
        """
        if proxy_mode is not None and proxy_mode not in PROXY_MODES:
            raise ValueError(f"proxy_mode={proxy_mode!r} is unknown; choose one of {', '.join(PROXY_MODES)}.")
        if window_size is not None:
            self.window_size = legal_triple("window_size", window_size)
        if proxy_ratio is not None:
            self.proxy_ratio = legal_triple("proxy_ratio", proxy_ratio)
        if proxy_mode is not None:
            self.proxy_mode = proxy_mode
        self.windows_were_set |= window_size is not None or proxy_ratio is not None

    def reset_windows(self) -> None:
        """Goes back to the trained window size and proxy ratio."""
        self.window_size, self.proxy_ratio = self.trained_windows
        self.windows_were_set = False

    def auto_windows(self, height: int, width: int) -> tuple[Triple, Triple]:
        """Window size and proxy ratio that keep the trained number of windows (section 3.2.3 of the paper).

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
        """Multiplies linear layers that follow one another: the same results up to rounding, for less work.

        For inference, at official width and 1024 px 3.3 of 22 D^2 products per token less: output layer and
        `linear_1_visual` of the injection become one, cross-attentions with few keys fold their query layer into the
        keys and their output layer into the values, and `linear_2 * gate * to_out` of the shifted windows becomes one.
        Weights and `state_dict` stay as they are; D^2 numbers per block are added. Call it again after a change of
        weights, and after merging a LoRA; `unfuse_linear_layers` undoes it.

        Raises:
            ValueError: a weight is quantised, stored in 8 bits or not loaded, or carries a LoRA that is not merged.
        """
        for block in self.transformer_blocks:
            block.check_linear_layers()
        for block in self.transformer_blocks:
            block.fuse()

    def unfuse_linear_layers(self) -> None:
        """Undoes `fuse_linear_layers`."""
        for block in self.transformer_blocks:
            block.unfuse()

    def run_block(self, block: PTDiTBlock, *arguments: Any) -> Tensor:
        """Calls one block; hosts override it for checkpointing."""
        return block(*arguments)

    def denoise(
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
    ) -> Tensor:
        """Predicts x0 - noise (first `in_channels` channels; the rest is untrained).

        Args:
            latents: (B, C, F, height, width), height and width multiples of the patch size.
            timestep: (B,) in 0..1000, one per sample; one number, (1,) or expanded, is embedded once for all.
            encoder_hidden_states: (B, L, caption channels).
            encoder_attention_mask: bool (B, L), True = keep; None when all are kept.
            resolution, aspect_ratio: (B, 2), (B, 1); only for models with additional conditions.
            window_size, proxy_ratio, proxy_mode: for this call only.
            generator: draws the proxies of mode "random"; a list holds one for each sample, see `draw_proxies`.

        Returns:
            (B, out channels, F, height, width).
        """
        timestep = timestep.reshape(-1)[:1] if timestep.ndim == 0 or timestep.stride(0) == 0 else timestep
        window = self.window_size if window_size is None else legal_triple("window_size", window_size)
        ratio = self.proxy_ratio if proxy_ratio is None else legal_triple("proxy_ratio", proxy_ratio)
        batch, _, frames, height, width = latents.shape
        grid = (frames, height // self.patch_size, width // self.patch_size)

        hidden_states = self.pos_embed(latents)  # (B, N, D)
        dim, dtype = hidden_states.shape[-1], hidden_states.dtype
        positions = position_table(grid, dim, self.position_scale, self.scrambled_positions, latents.device)
        hidden_states = (hidden_states + positions).to(dtype)
        embedded, modulation = self.adaln_single(timestep, resolution, aspect_ratio, dtype)  # (B, D), (B, 6, D)
        text = self.caption_projection(encoder_hidden_states.to(dtype))  # (B, L, D)

        plan = ProxyPlan(grid, window, ratio)
        windows = Windows(grid, window, shifted=False, device=latents.device)
        shifted_windows = Windows(grid, window, shifted=True, device=latents.device) if self.shift_window else None
        mode = proxy_mode or self.proxy_mode
        index = None if mode == "mean" else proxy_index(*plan, None, latents.device)
        for block in self.transformer_blocks:
            if mode == "random":
                draw = draw_proxies(batch, plan.number(), generator, latents.device)
                index = proxy_index(*plan, draw, latents.device)
            hidden_states = self.run_block(
                block, hidden_states, text, modulation, encoder_attention_mask, plan, windows, shifted_windows, index
            )

        shift, scale = (self.scale_shift_table.to(hidden_states) + embedded[:, None]).chunk(2, dim=1)  # (B, 1, D)
        patches = self.proj_out(modulated_norm(hidden_states, shift, scale))  # (B, N, p*p*C)
        patches = patches.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, grid)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (B, C, F, height, width)

    def flow(self, sample: Tensor) -> Tensor:
        """Velocity noise - x0 in float32, (B, in channels, F, height, width), from the output of a forward.

        The network predicts x0 - noise in its first `in_channels` channels; flow-matching schedulers step on the
        opposite sign, in float32 so that latents are not rounded at each step.
        """
        return -sample[:, : self.in_channels].float()
