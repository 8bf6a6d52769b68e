"""Smaller copies of a model folder: python -m scripts.quantize MODEL --output DIR --format int8

int8 and fp8 give a whole folder for `from_pretrained`; GGUF formats give one file for each component, for
`PTDiTTransformer3DModel.from_single_file` and `T5EncoderModel.from_pretrained(..., gguf_file=..., config=...)`.
"""

import argparse
import sys
from pathlib import Path

from ptdit_diffusers.conversion.quantize import COMPONENTS, FORMATS, quantize
from ptdit_diffusers.core.checkpoint_names import ConversionError


def main(argv: list[str] | None = None) -> int:
    """Quantise, saying sizes.

    Returns:
        0, or 2 when the input was refused (one line on stderr says why).
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder that `ptdit convert` or save_pretrained wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS, help="default: both")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that exists")
    given = parser.parse_args(argv)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")

    try:
        quantize(given.model, given.output, given.format, tuple(given.components), given.overwrite, say)
    except (ConversionError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
