"""What the guiders of diffusers do to pictures of the embedded model, verified by their pixels, over the same noise.

python -m scripts.benchmarks.guiders --output docs/benchmarks/guiders.json --sheet docs/shapes-128/guiders.png
"""

import sys
from pathlib import Path

import numpy as np
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from einops import rearrange
from PIL import Image

from ptdit_diffusers import PTDiTModularPipeline
from scripts.evaluation.generate import generate, to_bytes
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.records import write_record
from scripts.verifiers.registry import VERIFIERS

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


def main(arguments: list[str] | None = None) -> None:
    """Generate the same prompts under each guider; write counts as JSON and one column of pictures per guider."""
    parser = make_parser("scripts.benchmarks.guiders", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE", help="PNG to write")
    add_sampling_options(parser, prompts=40, steps=30)
    args = parser.parse_args(arguments)
    verifier = VERIFIERS["pictures"]
    tasks = [verifier.task(number, 0, True) for number in range(args.prompts)]
    prompts, requests = [task.prompt for task in tasks], [verifier.request(task) for task in tasks]
    pipe = PTDiTModularPipeline.from_pretrained("shapes-128")
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)

    def call(prompts: list[str], **arguments: object) -> np.ndarray:
        return pipe(prompt=prompts, output="images", **arguments)

    columns, counts = [], {}
    for name, make in GUIDERS.items():
        pipe.update_components(guider=make())
        pictures = [to_bytes(picture) for picture in generate(call, prompts, num_inference_steps=args.steps)]
        verdicts = [verifier.verify(*pair) for pair in zip(requests, np.stack(pictures)[:, None], strict=True)]
        tally = verifier.tally(verdicts)
        counts[name] = {row: {"right": tally[row][0], "asked": tally[row][1]} for row in SHOWN}
        columns.append(pictures[:SHEET_ROWS])
        sys.stderr.write(f"{name}: {tally['everything right']}\n")
    result = {"model": "shapes-128", "steps": args.steps, "scale": SCALE, "layer": LAYER, "guiders": counts}
    write_record(args.output, result | {"sheet_prompts": prompts[:SHEET_ROWS]})
    sheet = rearrange(np.array(columns), "guider prompt h w c -> (prompt h) (guider w) c")
    Image.fromarray(sheet).save(args.sheet)


if __name__ == "__main__":
    main()
