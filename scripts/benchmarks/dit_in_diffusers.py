"""The same DiT weights in diffusers' own class: how far its pictures are from DiT's, and the pictures side by side.

    python -m scripts.benchmarks.dit_in_diffusers --model dit-128 --output docs/benchmarks/dit_in_diffusers.json \
        --picture docs/dit/diffusers.webp

Rows of the picture: DiT; diffusers' network; and diffusers' network with guidance of all channels, as `DiTPipeline`
guides. All through the official sampler with the same noise.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ptdit_diffusers import ClassToImagePipeline, DiT2DModel
from ptdit_diffusers.core.dit_checkpoints import diffusers_sources
from scripts.evaluation.generate import load_pipeline
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.records import now, processor, versions, write_record

SHARED = (  # arguments of both classes
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "in_channels",
    "out_channels",
    "sample_size",
    "patch_size",
)


def in_diffusers(transformer: DiT2DModel) -> DiTTransformer2DModel:
    """Return diffusers' class with the weights of ours."""
    config = transformer.config
    shared = {name: config[name] for name in SHARED}
    other = DiTTransformer2DModel(**shared, num_embeds_ada_norm=config.num_classes)
    weights, official = other.state_dict(), transformer.state_dict()
    sources, copies = diffusers_sources(weights)
    for name, targets in sources.items():
        parts = [official[name]] * len(copies[name]) if name in copies else official[name].chunk(len(targets))
        for target, value in zip(copies.get(name, targets), parts, strict=True):
            weights[target] = value.reshape(weights[target].shape)
    other.load_state_dict(weights)
    return other.eval()


class DiffusersNetwork(DiT2DModel):
    """Ours on the outside, diffusers' network within, so that one pipeline samples both."""

    def use(self, network: nn.Module) -> "DiffusersNetwork":
        """Predict with this network from now on."""
        self.network = network
        return self

    def predict(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.network(hidden_states, timestep.expand(len(hidden_states)), class_labels).sample


@torch.no_grad()
def compared(pipe: ClassToImagePipeline, classes: Sequence[int], steps: int, guidance: float, seed: int) -> dict:
    """Return for each of the three ways its latents (B, C, H, W) and pictures (B, H, W, 3) in 0..1."""
    network = DiffusersNetwork.from_config(pipe.transformer.config).use(in_diffusers(pipe.transformer)).eval()
    other = ClassToImagePipeline(network, pipe.vae, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    found = {}
    for name, pipeline, options in (
        ("DiT", pipe, {"guidance_channels": 3}),
        ("diffusers' network", other, {"guidance_channels": 3}),
        ("diffusers' network, all channels guided", other, {"guidance_channels": "all"}),
    ):
        generators = [torch.Generator().manual_seed(seed + number) for number in range(len(classes))]
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators, **options}
        latents = pipeline(list(classes), output_type="latent", **call).images
        found[name] = {"latents": latents, "pictures": pipeline.decode_latents(latents, "np")}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = make_parser("scripts.benchmarks.dit_in_diffusers", __doc__)
    add_sampling_options(parser, model="dit-128", steps=250, guidance=1.5, seed=0)
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(0, 80, 9)), help="class numbers")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--picture", type=Path, required=True, help="picture file")
    flags = parser.parse_args(arguments)
    pipe = load_pipeline(flags.model)
    found = compared(pipe, flags.classes, flags.steps, flags.guidance, flags.seed)
    exact = found["DiT"]
    rows: dict[str, Any] = {}
    for name, each in found.items():
        change = (each["latents"] - exact["latents"]).square().mean().sqrt()
        rows[name] = {
            "latents_rms": round(float(change), 5),
            "pictures_mean_levels": round(float(np.abs(each["pictures"] - exact["pictures"]).mean() * 255), 3),
        }
    settings = {name: getattr(flags, name) for name in ("model", "steps", "guidance", "seed", "classes")}
    facts = {"date": now(), "processor": processor(), "versions": versions(("torch", "diffusers"))}
    spread = round(float(exact["latents"].std()), 4)
    write_record(flags.output, {**facts, "settings": settings, "latents_std": spread, "rows": rows})
    sheet = rearrange(np.stack([each["pictures"] for each in found.values()]), "r b h w c -> (r h) (b w) c")
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(flags.picture)
    for name, row in rows.items():
        latents, pictures = row["latents_rms"], row["pictures_mean_levels"]
        sys.stdout.write(f"{name:42} latents {latents:.4f} rms, pictures {pictures:.2f} levels\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
