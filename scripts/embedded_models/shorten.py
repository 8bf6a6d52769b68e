"""A model folder that a zip file stores smaller: half precision for some parts, and few bits of each weight.

    python -m scripts.embedded_models.shorten MODEL OUTPUT --half transformer vae --bits 6

A number in half precision has 10 bits after its first one. Of these, those of weights are nearly random, and a wheel
cannot store them smaller. With 6 bits, weights change by 0.8 % at most, 0.4 % on average, and the types of the files
stay, so everything loads as before.
"""

import argparse
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ptdit_diffusers.core.folder_files import COMPONENTS, new_folder

KINDS = {torch.float16: (torch.int16, 10), torch.bfloat16: (torch.int16, 7), torch.float32: (torch.int32, 23)}


def shortened(value: Tensor, bits: int) -> Tensor:
    """Return a tensor of the same type whose numbers have at most so many bits after their first one, rounded."""
    if value.dtype not in KINDS or (drop := KINDS[value.dtype][1] - bits) <= 0:
        return value
    whole = value.contiguous().view(KINDS[value.dtype][0]).long()  # sign and size: adding makes the size larger
    down = (whole >> drop) << drop
    near = ((whole + (1 << (drop - 1))) >> drop) << drop
    numbers = [each.to(KINDS[value.dtype][0]).view(value.dtype) for each in (near, down)]
    return torch.where(numbers[0].isfinite(), *numbers)  # the largest numbers are not rounded up to infinity


def shorten_file(path: Path, bits: int, half: bool) -> str:
    """Rewrite a safetensors file of weights, and return in words what that changed.

    Args:
        path: Of the file.
        bits: Of each number, after its first one.
        half: Store float32 as float16.
    """
    weights = load_file(path)
    stored = {
        name: value.half() if half and value.dtype == torch.float32 else value for name, value in weights.items()
    }
    stored = {name: shortened(value, bits) for name, value in stored.items()}
    matrices = {name: value.double() for name, value in weights.items() if value.ndim > 1}
    changes = [
        ((stored[name].double() - value).norm() / value.norm().clamp(min=1e-30)).item()
        for name, value in matrices.items()
    ]
    content, before = save(stored, metadata={"format": "pt"}), path.read_bytes()
    path.write_bytes(content)
    sizes = [f"{len(each) / 1e6:.2f} MB, {len(zlib.compress(each)) / 1e6:.2f} in a zip" for each in (before, content)]
    return f"{sizes[0]} -> {sizes[1]}; matrices change by {max(changes, default=0):.2%} at most"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts.embedded_models.shorten", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("output", type=Path, help="new model folder")
    parser.add_argument("--bits", type=int, default=6, help="of each number, after its first one (default 6)")
    parser.add_argument("--half", nargs="*", default=(), choices=COMPONENTS, help="parts stored in half precision")
    args = parser.parse_args(arguments)
    if not 1 <= args.bits <= 23:
        parser.error(f"--bits={args.bits} must be 1 to 23; nearest: {min(max(args.bits, 1), 23)}.")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"{args.model} is no model folder: model_index.json is missing.")
    if args.output.exists():
        parser.error(f"{args.output} exists; give another folder.")
    with new_folder(args.output) as made:
        shutil.copytree(args.model, made, dirs_exist_ok=True)
        for path in sorted(made.rglob("*.safetensors")):
            name = path.relative_to(made)
            sys.stdout.write(f"{name}: {shorten_file(path, args.bits, name.parts[0] in args.half)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
