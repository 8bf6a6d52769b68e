"""Encode one's own data ahead of a training, in parts by any number of machines: `ptdit encode`."""

import logging
from collections.abc import Sequence
from contextlib import suppress

from accelerate import PartialState

from ptdit_diffusers.core.arguments import LineParser
from ptdit_diffusers.training.command import begin_log, exit_code
from ptdit_diffusers.training.own_data.model import make_base
from ptdit_diffusers.training.own_data.prepare import count_parts, encode_part, merge_parts, source_of
from ptdit_diffusers.training.own_data.settings import by_source, read_settings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: encode(arguments), "encode")


def encode(arguments: Sequence[str] | None) -> int:
    """Encode what the command line asks for, and return the exit code.

    Raises:
        ValueError, OSError: Something is not right.
    """
    parser = LineParser(
        prog="ptdit encode",
        description="Encode the pictures of a training ahead of it. What is encoded already stays as it is.",
        epilog="Example: ptdit encode --config big.yaml --part 3/64 on each machine, then ptdit encode --config "
        "big.yaml --merge",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of the training, see docs/train-your-own.md")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting: data.source=cats")
    add("--part", metavar="I/N", help="encode part I of N only, I from 0 to N - 1; the parts need no locks")
    add("--merge", action="store_true", help="write the index of all parts, when they are encoded")
    flags = parser.parse_args(arguments)
    begin_log(logging.INFO)
    settings = read_settings(flags.config, flags.set)
    if settings.vae.train != "no":
        raise ValueError("vae.train changes the VAE that encodes: `ptdit train` encodes after it was trained.")
    if flags.merge and flags.part:
        raise ValueError("--part and --merge exclude each other.")
    base = make_base(settings)
    part, parts = part_of(flags.part) if flags.part else (0, 1)
    for source, each in by_source(settings).items():
        if flags.merge:
            if not (parts := count_parts(each, base)):
                raise ValueError(f"no part of data {source!r} is encoded yet; leave --merge out.")
        else:
            source_of(each).count()  # refuses what is not right
            encode_part(each, base, PartialState().device, part, parts)
        if flags.merge or parts == 1:
            logger.info("the index of %s is %s", source, merge_parts(each, base, parts))
    return 0


def part_of(text: str) -> tuple[int, int]:
    """Return part and number of parts of a text such as "3/64".

    Raises:
        ValueError: It is no such text.
    """
    with suppress(ValueError):
        part, parts = (int(each) for each in text.split("/"))
        if 0 <= part < parts:
            return part, parts
    raise ValueError(f"--part {text!r} is not I/N with I from 0 to N - 1; nearest: 0/1.")


if __name__ == "__main__":
    raise SystemExit(main())
