"""Write docs/schedulers.md: every scheduler class of diffusers, and whether it fits PT-DiT.

    python -m scripts.benchmarks.scheduler_classes --output docs/schedulers.md

Each class is made from the embedded model's scheduler with `from_config`, first without options, then with those that
flow matching needs, and runs two steps.
"""

import contextlib
import inspect
import io
import warnings
from pathlib import Path

import diffusers
import diffusers.schedulers
from diffusers.utils import logging

from ptdit_diffusers import PTDiTPipeline
from scripts.evaluation.options import make_parser

SHIFT = (64 / 28) ** 0.5  # time shift of the embedded model at its own size
OPTIONS = (
    {},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    {"shift": SHIFT},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT},
)
HEAD = """# Schedulers

Every scheduler class of diffusers with the result that `PTDiTPipeline` gives with it. Written by
`python -m scripts.benchmarks.scheduler_classes --output docs/schedulers.md`; a test compares it. *Runs* means that the
scheduler steps on the flow that the model predicts; what else its noise levels need is written beside it. Everything
else raises a `ValueError` that names the scheduler. How exact they are is in [pipelines](pipelines.md).
`FlowMatchLCMScheduler` runs, but is made for models distilled for few steps. Classes whose own packages are not
installed are not listed.

One scheduler object serves one call at a time. Threads share the weights, but not the scheduler:
`PTDiTPipeline.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))`.

| class | result |
| --- | --- |
"""


def scheduler_classes() -> list[type]:
    """Return the classes of `diffusers.schedulers` that set timesteps, sorted by name."""
    classes = (getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers))
    return sorted(
        (
            cls
            for cls in classes
            if isinstance(cls, type) and not hasattr(cls, "_backends") and hasattr(cls, "set_timesteps")
        ),
        key=lambda cls: cls.__name__,
    )


def describe(pipe: PTDiTPipeline, cls: type) -> str:
    """Return "runs" with the options that it needs, or "refused" (by the class itself or by the pipeline)."""
    base, known = pipe.scheduler, inspect.signature(cls.__init__).parameters
    try:
        for options in OPTIONS:
            if set(options) - set(known):
                continue
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                try:
                    scheduler = cls.from_config(base.config, **options)
                except TypeError:
                    return "refused: cannot be made from the configuration of a scheduler of flows"
                pipe.scheduler = scheduler
                try:
                    pipe("a red circle", num_inference_steps=2, output_type="latent")
                except ValueError as error:
                    assert cls.__name__ in str(error), error
                else:
                    return "runs" + _described(options)
        return "refused"
    finally:
        pipe.scheduler = base


def _described(options: dict) -> str:
    written = [
        f"`{name}=" + (f"{value:.4g}`" if isinstance(value, float) else f"{value!r}`")
        for name, value in options.items()
    ]
    note = "; the shift is that of the size" if {"shift", "flow_shift"} & set(options) else ""
    return (f" with {', '.join(written)}" if written else "") + note


def main(arguments: list[str] | None = None) -> None:
    """Try all classes and write the page."""
    parser = make_parser("scripts.benchmarks.scheduler_classes", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Markdown to write")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    pipe = PTDiTPipeline.from_pretrained("shapes-128")
    pipe.set_progress_bar_config(disable=True)
    rows = [f"| `{cls.__name__}` | {describe(pipe, cls)} |\n" for cls in scheduler_classes()]
    args.output.write_text(HEAD + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
