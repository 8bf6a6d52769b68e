"""Measures diffusers' caches on a model: how much faster than without one, and how far from its pictures.

    python -m scripts.benchmarks.caches --output docs/benchmarks/caches.json

Every prompt is drawn without a cache and with each cache, one after the other, so that a busy machine slows all alike.
A speed is the median over prompts of (time without) / (time with); times are those of the whole call but the VAE.
PSNR is over pixels in 0..1 against the picture without a cache. The table is written to stdout.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
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

from ptdit_diffusers import PTDiTPipeline

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
    """Name -> maker of a cache's configuration; `ratios` are MagCache's, calibrated for this model and these steps."""

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


def calibrate(draw: Callable, pipe: PTDiTPipeline, steps: int) -> list[float]:
    """MagCache's ratios of one run; diffusers offers them only as a line that it prints."""
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        draw(0)
    pipe.transformer.disable_cache()
    return ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise in decibels; infinite for equal pictures."""
    error = (picture - reference).square().mean()
    return float("inf") if error == 0 else float(-10 * torch.log10(error))


@torch.no_grad()
def measure(model: str, steps: int, guidance: float, prompts: list[str]) -> dict:
    """Draws every prompt without and with each cache; the result is what the JSON holds."""
    pipe = PTDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}

    def draw(number: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        latents = pipe(prompts[number], generator=torch.Generator().manual_seed(number), **sampling).images
        return time.perf_counter() - start, latents

    draw(0)  # warm up
    ratios = calibrate(draw, pipe, steps)
    configured = configurations(pipe, steps, ratios)
    seconds = {name: [] for name in ("none", *configured)}
    closeness = {name: [] for name in configured}
    for number, prompt in enumerate(prompts):
        spent, latents = draw(number)
        seconds["none"].append(spent)
        reference = pipe.decode_latents(latents, "pt")
        for name, configuration in configured.items():
            pipe.transformer.enable_cache(configuration())
            spent, latents = draw(number)
            pipe.transformer.disable_cache()
            seconds[name].append(spent)
            closeness[name].append(psnr(pipe.decode_latents(latents, "pt"), reference))
        sys.stderr.write(f"{number + 1} of {len(prompts)}: {prompt}\n")

    rows = {}
    for name in configured:
        speeds = [plain / cached for plain, cached in zip(seconds["none"], seconds[name], strict=True)]
        rows[name] = {
            "speed": round(statistics.median(speeds), 2),
            "speeds": [round(speed, 3) for speed in speeds],
            "psnr_db": round(statistics.median(closeness[name]), 1),
            "psnrs_db": [round(value, 2) for value in closeness[name]],
        }
    return {
        "settings": {"model": model, "steps": steps, "guidance": guidance, "prompts": prompts},
        "seconds_without": round(statistics.median(seconds["none"]), 3),
        "mag_ratios": [round(ratio, 4) for ratio in ratios],
        "caches": rows,
    }


def table(rows: dict[str, dict]) -> str:
    """The rows in Markdown: medians and, in brackets, the extremes over prompts."""
    lines = ["| cache | speed | PSNR in dB |", "| --- | --- | --- |"]
    for name, row in rows.items():
        speeds, psnrs = row["speeds"], row["psnrs_db"]
        lines.append(
            f"| {name} | {row['speed']:.2f} ({min(speeds):.2f} to {max(speeds):.2f}) "
            f"| {row['psnr_db']:.1f} ({min(psnrs):.1f} to {max(psnrs):.1f}) |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.caches", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-128", help="folder or short name (default shapes-128)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default 4)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"1 to {len(PROMPTS)} (default all)")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(arguments)
    if not 1 <= args.prompts <= len(PROMPTS):
        parser.error(
            f"--prompts={args.prompts} is not in 1 to {len(PROMPTS)}; nearest: {min(max(args.prompts, 1), 8)}."
        )
    if args.steps < 4:
        parser.error(f"--steps={args.steps} is too few for a cache to skip any; nearest: 4.")
    if args.output and not Path(args.output).parent.is_dir():
        parser.error(f"--output={args.output}: there is no folder {Path(args.output).parent}.")
    start = time.time()
    result = measure(args.model, args.steps, args.guidance, list(PROMPTS[: args.prompts]))
    packages = ("torch", "diffusers", "transformers")
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - start, 1),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    if args.output:
        Path(args.output).write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(result["caches"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
