"""The model of a finished run with another average of its weights: `ptdit average`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptdit_diffusers.core.arguments import LineParser
from ptdit_diffusers.training.average import average_snapshots, exponent
from ptdit_diffusers.training.command import begin_log, exit_code
from ptdit_diffusers.training.own_data.card import card
from ptdit_diffusers.training.own_data.model import export_model, load_trained, make_base, make_networks
from ptdit_diffusers.training.own_data.settings import OwnDataSettings
from ptdit_diffusers.training.own_data.task import SNAPSHOTS
from ptdit_diffusers.training.settings import build

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: average(arguments), "average")


def average(arguments: Sequence[str] | None) -> int:
    """Write the model with the average that the command line asks for, and return the exit code.

    Raises:
        ValueError, OSError: Something is not right.
    """
    parser = LineParser(
        prog="ptdit average",
        description="Write the model of a run with an average of its weights of another width, from its snapshots.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run of ptdit train")
    add("--width", type=float, required=True, help="relative width of the average, 0.02 to 0.25; more is smoother")
    add("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    flags = parser.parse_args(arguments)
    begin_log(logging.INFO)
    exponent(flags.width)  # refuses what is no width
    if flags.output.exists():
        raise ValueError(f"--output {flags.output} exists; give another folder.")
    path = flags.run / "run.json"
    try:
        settings = build(OwnDataSettings, json.loads(path.read_text(encoding="utf-8"))["settings"], str(path))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{flags.run} is no folder of a run of ptdit train ({error}).") from error
    settings = replace(settings, run=replace(settings.run, output=str(flags.run)))  # where it lies now
    values, step = average_snapshots(flags.run / SNAPSHOTS, flags.width)
    places = {"vae": flags.run / "vae/export/vae"}
    places |= {name: flags.run / "text/export" / name for name in ("tokenizer", "text_encoder")}
    base = make_base(settings, {name: place for name, place in places.items() if place.is_dir()})
    model = make_networks(settings, base)
    load_trained(model, values)
    text = card(settings, flags.output.resolve().name, step, f"their average of width {flags.width}")
    export_model(settings, base, model.eval(), flags.output, text)
    logger.info("wrote %s: width %s at step %d", flags.output, flags.width, step)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
