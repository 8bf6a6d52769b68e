"""`ptdit export`: a folder for the Hugging Face Hub with its own code. Arguments and messages only."""

import argparse
from pathlib import Path
from typing import Any

from .models import DEFAULT_MODEL, HUB_ID, download, find_model, silence_libraries
from .terminal import UserError, errors_of_writing, first_line, interrupt_ends_at_once, say, say_warnings

SAMPLE_PROMPTS = {  # of models that come with the package
    "shapes-128": [
        "a large red circle, white background",
        "a blue square left of a yellow star",
        "a green heart above an orange ring",
    ]
}


def add_command(commands: Any) -> None:
    """Add `export` to the subcommands of the parser."""
    parser = commands.add_parser(
        "export",
        help="write a folder for the Hugging Face Hub, with the code to load it",
        description="Write a folder for the Hugging Face Hub: weights, configurations, the code that loads them where "
        "this package is not installed, a model card, sample images and hashes. Nothing is uploaded without --push.",
        epilog="Example: ptdit export --model my-model --output my-export",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="a model that comes with this package, a "
        "folder, or a Hub id OWNER/NAME (default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a folder that was exported before (default: refuse)")
    add("--prompt", action="append", metavar="TEXT", help="prompt or class of a sample image; may be repeated "
        "(default: three for shapes-128, else none)")  # fmt: skip
    add("--license", "--licence", metavar="NAME", help='license of the weights, as the Hub spells it, e.g. apache-2.0 '
        '(default: that of the model\'s card, else "other")')  # fmt: skip
    add("--push", metavar="OWNER/NAME", help="upload to this repository of the Hub, which is created if it is missing")
    add("--branch", metavar="NAME", help="with --push: branch to upload to (default: main)")
    add("--pull-request", action="store_true", help="with --push: open a pull request instead")
    add("--private", action="store_true", help="with --push: make a new repository private")


def run(arguments: argparse.Namespace) -> None:
    """Export, and upload if that was asked for.

    Raises:
        UserError: The model cannot be exported, the folder cannot be written, or the upload failed.
    """
    check_push(arguments)
    folder = find_model(arguments.model)
    with interrupt_ends_at_once():
        silence_libraries()
        from ..export.folder import ExportError, export
        from ..export.push import push
    say_warnings()
    prompts = SAMPLE_PROMPTS.get(arguments.model, []) if arguments.prompt is None else arguments.prompt
    with errors_of_writing(arguments.output, ExportError):
        names = export(
            folder or download(arguments.model), arguments.output, prompts, arguments.license, arguments.overwrite
        )
    say(f"saved {arguments.output} ({len(names)} files)")
    if arguments.push is None:
        return
    try:
        address = push(arguments.output, arguments.push, arguments.branch, arguments.pull_request, arguments.private)
    except Exception as error:  # network, Hub and access fail in many ways; the folder is there whatever happened
        raise UserError(
            f"the upload to {arguments.push} failed: {first_line(error)}; {arguments.output} is kept, and the same "
            "command with --overwrite continues it"
        ) from error
    say(f"uploaded {address}")


def check_push(arguments: argparse.Namespace) -> None:
    """Refuse a name that the Hub cannot have, options that need --push, and those that exclude each other."""
    name = arguments.push
    if name is not None and (not HUB_ID.fullmatch(name) or ".." in name or "--" in name):
        raise UserError(f"--push {name!r} is no name of a repository; give OWNER/NAME, for example me/my-model")
    options = {"--branch": arguments.branch, "--pull-request": arguments.pull_request, "--private": arguments.private}
    given = [name for name, value in options.items() if value]
    if given and arguments.push is None:
        raise UserError(f"{given[0]} needs --push OWNER/NAME")
    if arguments.branch and arguments.pull_request:
        raise UserError("--branch and --pull-request exclude each other; a pull request goes to main")
