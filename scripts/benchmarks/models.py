"""The models that are measured, each as a function of no arguments, with random weights.

| name | model |
| --- | --- |
| bare | the Linear shapes of PT-DiT's blocks and nothing else: the floor |
| ptdit, fused | PT-DiT of the given width, as it is and after `fuse_linear_layers` |
| ptdit-864 | PT-DiT/L of the paper: about the parameters of PixArt at width 1152 |
| pixart, dit | diffusers' PixArtTransformer2DModel and DiTTransformer2DModel (pictures) |
| wan | diffusers' WanTransformer3DModel with a feed-forward of 4 D: attention over all tokens of a video |
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptdit_diffusers.core.backbones.proxies import ProxyPlan
from ptdit_diffusers.core.backbones.windows import Triple
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

PICTURES = ("bare", "ptdit", "fused", "ptdit-864", "pixart", "dit")
VIDEOS = ("bare", "ptdit", "fused", "wan")
HEAD_DIM = 72


@dataclass(frozen=True)
class Job:
    """One size of a forward: latent frames, pixels of a side, and what all models share."""

    frames: int
    pixels: int
    layers: int
    batch: int
    text: int
    heads: int
    caption: int

    @property
    def grid(self) -> Triple:
        return (self.frames, self.pixels // 16, self.pixels // 16)

    @property
    def window(self) -> Triple:
        """The paper's: 64 windows a frame, four latent frames together in a video."""
        side = max(1, self.pixels // 128)
        return (1 if self.frames == 1 else 4, side, side)


def build(name: str, job: Job) -> nn.Module:
    """Build a model on the current default device; `bare` is PT-DiT's."""
    heads = 12 if name == "ptdit-864" else job.heads
    sizes = {"num_attention_heads": heads, "attention_head_dim": HEAD_DIM, "num_layers": job.layers}
    if name == "pixart":
        from diffusers import PixArtTransformer2DModel

        cross = {"cross_attention_dim": heads * HEAD_DIM, "caption_channels": job.caption, "out_channels": 8}
        return PixArtTransformer2DModel(
            **sizes, **cross, sample_size=job.pixels // 8, use_additional_conditions=False
        ).eval()
    if name == "dit":
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(**sizes, out_channels=8, sample_size=job.pixels // 8).eval()
    if name == "wan":
        from diffusers import WanTransformer3DModel

        ends = {"in_channels": 4, "out_channels": 8, "text_dim": job.caption, "freq_dim": 256}
        return WanTransformer3DModel(**sizes, **ends, ffn_dim=4 * heads * HEAD_DIM).eval()
    return PTDiTTransformer3DModel(
        **sizes, caption_channels=job.caption, window_size=job.window, proxy_ratio=job.window
    ).eval()


def inputs(name: str, job: Job, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of a model's forward on the current default device."""
    side = job.pixels // 8
    latents = torch.randn(job.batch, 4, job.frames, side, side).to(dtype)
    text = torch.randn(job.batch, job.text, job.caption).to(dtype)
    timestep = torch.full((1,), 500.0).expand(job.batch)
    if name == "dit":
        labels = torch.zeros(job.batch, dtype=torch.long)
        return {"hidden_states": latents[:, :, 0], "timestep": timestep.long(), "class_labels": labels}
    if name == "pixart":
        none = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        latents = latents[:, :, 0]
        return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep} | none
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep}


def bare_products(transformer: PTDiTTransformer3DModel, job: Job, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that applies every linear layer of the blocks to random tokens, proxies and text."""
    dim, device = job.heads * HEAD_DIM, transformer.device
    tokens = job.batch * job.grid[0] * job.grid[1] * job.grid[2]
    proxies = job.batch * ProxyPlan(job.grid, job.window, job.window).number()
    rows = {
        count: torch.randn(count, dim, device=device).to(dtype) for count in (tokens, proxies, job.batch * job.text)
    }
    wide = torch.randn(tokens, 4 * dim, device=device).to(dtype)

    def layers(block: nn.Module) -> list[tuple[nn.Module, Tensor]]:
        def attention(part: nn.Module, queries: int, keys: int) -> list[tuple[nn.Module, Tensor]]:
            x, source = rows[queries], rows[keys]
            return [(part.to_q, x), (part.to_k, source), (part.to_v, source), (part.to_out[0], x)]

        return [
            *attention(block.proxy_attn1, proxies, proxies),
            *attention(block.pvisual_attn2, tokens, proxies),
            (block.linear_1_visual, rows[tokens]),
            *attention(block.attn1, tokens, tokens),
            *attention(block.attn3, tokens, tokens),
            (block.linear_2, rows[tokens]),
            *attention(block.attn2, tokens, job.batch * job.text),
            (block.ff.net[0].proj, rows[tokens]),
            (block.ff.net[2], wide),
        ]

    products = list(chain.from_iterable(layers(block) for block in transformer.transformer_blocks))

    def run() -> None:
        for layer, x in products:
            F.linear(x, layer.weight, layer.bias)

    return run


def prepare(name: str, job: Job, dtype: torch.dtype, device: str, compiled: bool) -> tuple[nn.Module, Callable]:
    """Return a loaded model and the function to time."""
    with torch.device("meta"):
        model = build(name, job)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    if name == "bare":
        return model, bare_products(model, job, dtype)
    if name == "fused":
        model.fuse_linear_layers()
    with torch.device(device):
        arguments = inputs(name, job, dtype)
    if compiled:
        model.compile(fullgraph=name in ("ptdit", "fused", "ptdit-864"))
    return model, lambda: model(**arguments, return_dict=False)
