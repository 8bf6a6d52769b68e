"""What the guiders of diffusers do to the embedded model's pictures, judged by their pixels, over the same noise.

python -m scripts.benchmarks.guiders --output docs/benchmarks/guiders.json --sheet docs/shapes-128/guiders.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from PIL import Image

from ptdit_diffusers import PTDiTModularPipeline
from scripts.datasets.shapes import describe, sample_scene
from scripts.verifiers.pictures.figures import read_picture
from scripts.verifiers.pictures.verdict import Verdict, request_of_scene, verify_picture
from scripts.verifiers.report import add_up

SCALE, LAYER = 4.0, 3  # of six layers
GUIDERS = {
    "none": lambda: ClassifierFreeGuidance(guidance_scale=1.0),
    "CFG": lambda: ClassifierFreeGuidance(guidance_scale=SCALE),
    "CFG, rescale 0.7": lambda: ClassifierFreeGuidance(guidance_scale=SCALE, guidance_rescale=0.7),
    "CFG-Zero*": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=1),
    "APG": lambda: AdaptiveProjectedGuidance(guidance_scale=SCALE, eta=0.0),
    "SLG": lambda: SkipLayerGuidance(SCALE, skip_layer_config=LayerSkipConfig([LAYER])),
    "PAG": lambda: PerturbedAttentionGuidance(SCALE, perturbed_guidance_layers=[LAYER]),
}
SHOWN = ("right colours", "right shapes", "right relations", "everything right")
SHEET_ROWS = 6


def draw(pipe: PTDiTModularPipeline, prompts: list[str], steps: int) -> np.ndarray:
    """Pictures (n, H, W, 3) of bytes, picture i from seed i."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))]
    arguments = {"num_inference_steps": steps, "generator": generators, "output_type": "np"}
    return (pipe(prompt=prompts, output="images", **arguments) * 255).round().astype(np.uint8)


def judged(pictures: np.ndarray, tasks: list[tuple[str, object]]) -> list[Verdict]:
    """What is right in each picture."""
    return [
        verify_picture(read_picture(picture), request_of_scene(scene, prompt))
        for picture, (prompt, scene) in zip(pictures, tasks, strict=True)
    ]


def held_out_tasks(count: int) -> list[tuple[str, object]]:
    """The first prompts of `scripts.verify` with their scenes."""
    tasks = []
    for index in range(count):
        rng = np.random.default_rng([0, index])
        scene = sample_scene(rng, held_out=True)
        tasks.append((describe(scene, rng)[0], scene))
    return tasks


def main() -> None:
    """Draw the same prompts under each guider; write counts as JSON and one column of pictures per guider."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps per picture (default: %(default)s)")
    arguments = parser.parse_args()
    tasks = held_out_tasks(arguments.prompts)
    pipe = PTDiTModularPipeline.from_pretrained("shapes-128")
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    columns, counts = [], {}
    for name, make in GUIDERS.items():
        pipe.update_components(guider=make())
        pictures = draw(pipe, [prompt for prompt, _ in tasks], arguments.steps)
        tally = add_up(judged(pictures, tasks))
        counts[name] = {row: {"right": tally[row][0], "asked": tally[row][1]} for row in SHOWN}
        columns.append(np.concatenate(list(pictures[:SHEET_ROWS])))
        sys.stderr.write(f"{name}: {tally['everything right']}\n")
    prompts = [prompt for prompt, _ in tasks[:SHEET_ROWS]]
    result = {"model": "shapes-128", "steps": arguments.steps, "scale": SCALE, "layer": LAYER, "guiders": counts}
    arguments.output.write_text(json.dumps({**result, "sheet_prompts": prompts}, indent=1) + "\n", encoding="utf-8")
    Image.fromarray(np.concatenate(columns, axis=1)).save(arguments.sheet)


if __name__ == "__main__":
    main()
