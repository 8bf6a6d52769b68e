"""How near other flow-matching schedulers come to the exact path of the embedded model, at equal numbers of forwards.

    python -m scripts.benchmarks.schedulers --output docs/benchmarks/schedulers.json

The reference is many Euler steps from the same noise. The error is the standard deviation of the difference of the
final latents, divided by that of the latents.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ptdit_diffusers import PTDiTPipeline

PROMPTS = ["a large red circle, white background", "a blue square left of a yellow star"]
SHIFT = (64 / 28) ** 0.5  # time shift of the embedded model at its own size; Heun cannot be told it by the pipeline
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config),
    "FlowMatchHeunDiscreteScheduler": lambda config: FlowMatchHeunDiscreteScheduler(shift=SHIFT),
    "UniPCMultistepScheduler": lambda config: UniPCMultistepScheduler.from_config(config, **FLOW),
    "DPMSolverMultistepScheduler": lambda config: DPMSolverMultistepScheduler.from_config(config, **FLOW),
}


def latents(pipe: PTDiTPipeline, steps: int) -> torch.Tensor:
    """Final latents of the prompts, seeds 0, 1, ..., at the usual guidance."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=steps, generator=generators, output_type="latent").images


def main() -> None:
    """Run all schedulers and write the errors as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--forwards", type=int, nargs="+", default=[10, 30], help="forwards per picture (10 30)")
    parser.add_argument("--reference-steps", type=int, default=100, help="Euler steps of the reference (100)")
    arguments = parser.parse_args()
    pipe = PTDiTPipeline.from_pretrained("shapes-128")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    reference = latents(pipe, arguments.reference_steps)
    errors = {}
    for name, make in SCHEDULERS.items():
        pipe.scheduler = make(config)
        order = pipe.scheduler.order  # forwards per step; the first step of Heun's method needs only one
        errors[name] = {
            str(count): float((latents(pipe, (count + order - 1) // order) - reference).std() / reference.std())
            for count in arguments.forwards
        }
    result = {
        "model": "shapes-128",
        "prompts": PROMPTS,
        "reference_steps": arguments.reference_steps,
        "errors": errors,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
