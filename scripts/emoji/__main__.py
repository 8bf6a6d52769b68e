"""Emoji as training data, and judges of what a model of them makes. In this order:

    python -m scripts.emoji fetch DATA       six packages of the npm registry, by name and checksum: 28 MB
    python -m scripts.emoji draw DATA        every icon as a picture, and an index
    python -m scripts.emoji shards DATA      pictures on grounds with captions, for ptdit train
    python -m scripts.emoji judge DATA       train a judge; it is never used in training
    python -m scripts.emoji evaluate DATA --model MODEL --output DIR
    python -m scripts.emoji fifth DATA --output DIR      twenty pictures of a fifth style, for a LoRA
    python -m scripts.emoji evaluate-fifth DATA --model MODEL --lora LORA --output DIR
    python -m scripts.emoji folder DATA --output DIR     some hundred pictures with captions, as a user has them

DATA is a folder outside of the repository. The pictures are under the licenses of their authors: see docs/emoji.md.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from scripts.datasets.emoji.packages import PACKAGES, fetch
from scripts.datasets.emoji.pictures import draw_all, read_index
from scripts.datasets.emoji.shards import samples, some_samples, vae_samples, write_folder, write_tars
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.verifiers.emoji.networks import PLAIN, RESIDUAL

TRUE_PICTURES = "; without it, true pictures are judged"


def say(text: str) -> None:
    """Write a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fetch_packages(args: argparse.Namespace) -> None:
    """Bring the packages."""
    folder = args.data / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        new = fetch(package, folder, args.registry)
        what = "fetched" if new else "is there"
        say(f"{package.name} {package.version} {what} ({package.licence}; {package.credit})")


def draw_pictures(args: argparse.Namespace) -> None:
    """Draw every icon."""
    count = draw_all(args.data, args.processes, say)
    say(f"{count} pictures in {args.data / 'pictures'}")


def write_shards(args: argparse.Namespace) -> None:
    """Write the shards of the transformer and of the VAE, where they are not there."""
    from scripts.datasets.emoji.split import read_split

    pictures, split = read_index(args.data), read_split()
    for name, make in (("train", samples), ("vae", vae_samples)):
        folder = args.data / name
        if (folder / "000000.tar").is_file():  # a folder has its name only once all of it is written
            say(f"{folder} is there; to write it anew, remove it")
            continue
        count = write_tars(folder, make(args.data, pictures, split))
        say(f"{folder}: {count} samples")


def write_a_folder(args: argparse.Namespace) -> None:
    """Write a folder of pictures on white, as a user has them."""
    from scripts.datasets.emoji.split import read_split

    found = some_samples(args.data, read_index(args.data), read_split(), args.number)
    count = write_folder(args.output, found)
    say(f"{args.output}: {count} pictures with metadata.jsonl")


def write_a_fifth_style(args: argparse.Namespace) -> None:
    """Write twenty pictures of a style that the model does not know."""
    from scripts.emoji.fifth import write_fifth

    say(f"{args.output}: {write_fifth(args.data, args.output)} pictures with metadata.jsonl")


def evaluate_the_fifth_style(args: argparse.Namespace) -> None:
    """Make pictures in the fifth style and the four others, without a LoRA and with it."""
    from scripts.emoji.fifth import evaluate_fifth

    evaluate_fifth(args, say)


def write_split(args: argparse.Namespace) -> None:
    """Choose what is held out; for maintainers, once."""
    from ptdit_diffusers.core.files import replace_json
    from scripts.datasets.emoji.split import FILE, choose

    values = choose(read_index(args.data))
    replace_json(FILE, values)
    say(", ".join(f"{len(names)} {kind}" for kind, names in values.items()))


def train_judge(args: argparse.Namespace) -> None:
    """Train a judge and write it into the folder of the data."""
    from scripts.emoji.judges import make_judge

    make_judge(args.data, args.shape, args.samples, args.seed, say)


def evaluate_model(args: argparse.Namespace) -> None:
    """Let a model make held-out prompts, and judge what it makes."""
    from scripts.emoji.evaluate import evaluate

    evaluate(args, say)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "fetch": (fetch_packages, "bring the packages"),
    "draw": (draw_pictures, "draw every icon"),
    "shards": (write_shards, "write tar shards for ptdit train"),
    "folder": (write_a_folder, "write a folder of some hundred pictures"),
    "judge": (train_judge, "train a judge"),
    "evaluate": (evaluate_model, "judge the pictures of a model"),
    "fifth": (write_a_fifth_style, "write twenty pictures of a fifth style"),
    "evaluate-fifth": (evaluate_the_fifth_style, "judge the fifth style of a LoRA"),
    "split": (write_split, "choose what is held out; for maintainers"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; exit where one is bad."""
    parser = make_parser("scripts.emoji", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, (_, text) in COMMANDS.items():
        made[name] = commands.add_parser(name, help=text, description=text)
        made[name].add_argument("data", type=Path, metavar="DATA", help="folder of the data")
    made["fetch"].add_argument("--registry", default="", help="address to download from (default: npm's own)")
    made["draw"].add_argument("--processes", type=int, default=os.cpu_count(), help="at the same time (default: all)")
    add = made["folder"].add_argument
    add("--output", type=Path, required=True, help="new folder")
    add("--number", type=int, default=500, help="pictures (default: %(default)s)")
    add = made["judge"].add_argument
    add("--shape", choices=(RESIDUAL, PLAIN), default=RESIDUAL, help="of the network (default: %(default)s)")
    add("--samples", type=int, default=190_000, help="seen by the network of concepts (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    made["fifth"].add_argument("--output", type=Path, required=True, help="new folder")
    for name in ("evaluate", "evaluate-fifth"):
        add, fifth = made[name].add_argument, name != "evaluate"
        add("--model", required=fifth, help="folder or short name of a model" + TRUE_PICTURES * (not fifth))
        add("--lora", required=fifth, help="folder or file of a LoRA for it")
        add("--output", type=Path, required=True, help="folder for results.json, pictures and sheets")
        add("--shape", choices=(RESIDUAL, PLAIN), default=RESIDUAL, help="of the judge (default: %(default)s)")
        add("--number", type=int, default=200, help="pictures of each kind at most (default: %(default)s)")
        add("--batch", type=int, default=25, help="pictures at a time (default: %(default)s)")
        add("--device", help="torch device (default cuda where there is one, else cpu)")
        add_sampling_options(made[name], steps=30, guidance=4.0, seed=0)
    args = parser.parse_args(arguments)
    for name in ("number", "samples", "steps", "batch", "processes"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name}={getattr(args, name)} is less than 1; nearest: 1.")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for bad input, 1 where something cannot be fetched or written."""
    args = parse(arguments)
    try:
        COMMANDS[args.command][0](args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"python -m scripts.emoji: error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
