"""How near other flow-matching schedulers come to the exact path of the embedded model at equal numbers of forwards.

    python -m scripts.benchmarks.schedulers --output docs/benchmarks/schedulers.json

The reference is many Euler steps from the same noise. The error is the standard deviation of the difference of the
final latents, divided by that of the latents.
"""

from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ptdit_diffusers import PTDiTPipeline
from scripts.evaluation.generate import generate, load_pipeline
from scripts.evaluation.options import make_parser
from scripts.evaluation.records import write_record

PROMPTS = ["a large red circle, white background", "a blue square left of a yellow star"]
SHIFT = (64 / 28) ** 0.5  # time shift of the embedded model at its own size; Heun does not get it from the pipeline
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config),
    "FlowMatchHeunDiscreteScheduler": lambda config: FlowMatchHeunDiscreteScheduler(shift=SHIFT),
    "UniPCMultistepScheduler": lambda config: UniPCMultistepScheduler.from_config(config, **FLOW),
    "DPMSolverMultistepScheduler": lambda config: DPMSolverMultistepScheduler.from_config(config, **FLOW),
}


def latents(pipe: PTDiTPipeline, steps: int) -> Tensor:
    """Return the final latents of the prompts, seeds 0, 1, ..., at the usual guidance."""
    return torch.stack(list(generate(pipe, PROMPTS, num_inference_steps=steps, output_type="latent")))


def main(arguments: list[str] | None = None) -> None:
    """Run all schedulers and write the errors as JSON."""
    parser = make_parser("scripts.benchmarks.schedulers", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--forwards", type=int, nargs="+", default=[10, 30], help="forwards per picture (10 30)")
    parser.add_argument("--reference-steps", type=int, default=100, help="Euler steps of the reference (100)")
    args = parser.parse_args(arguments)
    pipe = load_pipeline("shapes-128")
    config = pipe.scheduler.config
    reference = latents(pipe, args.reference_steps)
    errors = {}
    for name, make in SCHEDULERS.items():
        pipe.scheduler = make(config)
        order = pipe.scheduler.order  # forwards per step; the first step of Heun's method needs only one
        errors[name] = {
            str(count): float((latents(pipe, (count + order - 1) // order) - reference).std() / reference.std())
            for count in args.forwards
        }
    facts = {"model": "shapes-128", "prompts": PROMPTS, "reference_steps": args.reference_steps}
    write_record(args.output, facts | {"errors": errors})


if __name__ == "__main__":
    main()
