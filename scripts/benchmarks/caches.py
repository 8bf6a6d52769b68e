"""Speed of diffusers' caches on a model, and the distance of the pictures from those without a cache.

    python -m scripts.benchmarks.caches --output docs/benchmarks/caches.json

Every prompt is generated without a cache and with each cache, one after the other, so that a busy machine slows all
alike. A speed is the median over prompts of (time without) / (time with); times are those of the whole call but the
VAE. PSNR is over pixels in 0..1 against the picture without a cache. The table is written to stdout.
"""

import ast
import contextlib
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from ptdit_diffusers import PTDiTPipeline
from scripts.benchmarks.psnr import psnr
from scripts.evaluation.generate import generate, load_pipeline
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.records import now, versions, write_record

PROMPTS = (
    "a red circle above a blue square",
    "a small green star left of a large purple heart, white background",
    "three yellow triangles on a striped background",
    "a pink ring inside a black square",
    "a big orange crescent below a small blue cross",
    "two brown circles and a green heart",
    "a white star above a red ring on a dotted background",
    "a purple square right of a yellow circle, checkered background",
)
ATTENTION = [r"transformer_blocks\.\d+\.(proxy_attn1|pvisual_attn2|attn[123])"]


def configurations(pipe: PTDiTPipeline, steps: int, ratios: list[float]) -> dict[str, Callable]:
    """Return by name how each cache's configuration is made.

    Args:
        pipe: That the caches are for.
        steps: Of a call.
        ratios: MagCache's, calibrated for this model and these steps.
    """

    def timestep() -> float:
        return float(pipe.current_timestep)

    return {
        "FirstBlockCache, threshold 0.15": lambda: FirstBlockCacheConfig(threshold=0.15),
        "TaylorSeer, attention, every 3rd step": lambda: TaylorSeerCacheConfig(
            cache_interval=3, taylor_factors_dtype=torch.float32, cache_identifiers=ATTENTION
        ),
        "TaylorSeer, lite, every 3rd step": lambda: TaylorSeerCacheConfig(
            cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True
        ),
        "MagCache, threshold 0.1": lambda: MagCacheConfig(threshold=0.1, num_inference_steps=steps, mag_ratios=ratios),
        "FasterCache": lambda: FasterCacheConfig(
            attention_weight_callback=lambda _: 0.3, current_timestep_callback=timestep, tensor_format="BCFHW"
        ),
        "PAB, every 2nd step": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=2,
            current_timestep_callback=timestep,
        ),
        "SeaCache, threshold 0.25": lambda: SeaCacheConfig(
            raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"].unbind(0))
        ),
    }


def calibrate(sample: Callable, pipe: PTDiTPipeline, steps: int) -> list[float]:
    """Return MagCache's ratios of one run; diffusers offers them only as a line that it prints."""
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sample(0)
    pipe.transformer.disable_cache()
    return ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


@torch.no_grad()
def measure(model: str, steps: int, guidance: float, prompts: list[str]) -> dict:
    """Generate every prompt without and with each cache; return what the JSON holds."""
    pipe = load_pipeline(model)
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}

    def sample(number: int) -> tuple[float, Tensor]:
        start = time.perf_counter()
        (latents,) = generate(pipe, [prompts[number]], number, **sampling)
        return time.perf_counter() - start, latents[None]

    sample(0)  # warm up
    ratios = calibrate(sample, pipe, steps)
    configured = configurations(pipe, steps, ratios)
    seconds = {name: [] for name in ("none", *configured)}
    psnrs = {name: [] for name in configured}
    for number, prompt in enumerate(prompts):
        spent, latents = sample(number)
        seconds["none"].append(spent)
        reference = pipe.decode_latents(latents, "pt").numpy()
        for name, configuration in configured.items():
            pipe.transformer.enable_cache(configuration())
            spent, latents = sample(number)
            pipe.transformer.disable_cache()
            seconds[name].append(spent)
            psnrs[name].append(psnr(pipe.decode_latents(latents, "pt").numpy(), reference))
        sys.stderr.write(f"{number + 1} of {len(prompts)}: {prompt}\n")

    rows = {}
    for name in configured:
        speeds = [plain / cached for plain, cached in zip(seconds["none"], seconds[name], strict=True)]
        rows[name] = {
            "speed": round(statistics.median(speeds), 2),
            "speeds": [round(speed, 3) for speed in speeds],
            "psnr_db": round(statistics.median(psnrs[name]), 1),
            "psnrs_db": [round(value, 2) for value in psnrs[name]],
        }
    return {
        "settings": {"model": model, "steps": steps, "guidance": guidance, "prompts": prompts},
        "seconds_without": round(statistics.median(seconds["none"]), 3),
        "mag_ratios": [round(ratio, 4) for ratio in ratios],
        "caches": rows,
    }


def table(rows: dict[str, dict]) -> str:
    """Return the rows in Markdown: medians and, in brackets, the extremes over prompts."""
    lines = ["| cache | speed | PSNR in dB |", "| --- | --- | --- |"]
    for name, row in rows.items():
        speeds, psnrs = row["speeds"], row["psnrs_db"]
        lines.append(
            f"| {name} | {row['speed']:.2f} ({min(speeds):.2f} to {max(speeds):.2f}) "
            f"| {row['psnr_db']:.1f} ({min(psnrs):.1f} to {max(psnrs):.1f}) |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = make_parser("scripts.benchmarks.caches", __doc__)
    add_sampling_options(parser, model="shapes-128", steps=30, guidance=4.0, prompts=len(PROMPTS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not 1 <= args.prompts <= len(PROMPTS):
        parser.error(
            f"--prompts={args.prompts} is not in 1 to {len(PROMPTS)}; nearest: {min(max(args.prompts, 1), 8)}."
        )
    if args.steps < 4:
        parser.error(f"--steps={args.steps} is too few for a cache to skip any; nearest: 4.")
    start = time.time()
    result = measure(args.model, args.steps, args.guidance, list(PROMPTS[: args.prompts]))
    about = {
        "date": now(),
        "seconds": round(time.time() - start, 1),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(("torch", "diffusers", "transformers")),
    }
    if args.output:
        write_record(args.output, about | result)
    sys.stdout.write(table(result["caches"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
