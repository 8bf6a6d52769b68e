"""`ptdit convert`: from official checkpoint files to a diffusers folder. Arguments and messages only."""

import argparse
from pathlib import Path
from typing import Any

from .loading import DTYPES
from .models import silence_libraries
from .terminal import UserError, errors_of_writing, interrupt_ends_at_once, number, say, say_warnings


def add_command(commands: Any) -> None:
    """Add `convert` to the subcommands of the parser."""
    parser = commands.add_parser(
        "convert",
        help="convert official checkpoint files to a diffusers model folder",
        description="Convert official checkpoint files to a diffusers model folder. A checkpoint is a file of this "
        "machine (.pt, .pth, .ckpt, .safetensors, or the .index.json of a sharded file), or one of the Hugging Face "
        "Hub, OWNER/NAME[@REVISION][:PATH], which is downloaded. No code in a file is run.",
        epilog="Example: ptdit convert --transformer model.pt --output my-model",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--transformer", metavar="FILE", help="checkpoint of a PT-DiT or DiT transformer")
    add("--vae", metavar="FILE", help="checkpoint of the Open-Sora-Plan v1.2 VAE (checkpoint.ckpt); for DiT "
        "also of a Stable Diffusion VAE")  # fmt: skip
    add("--text-encoder", metavar="DIR_OR_FILE", help="T5 text encoder: a folder of transformers, or one file such "
        "as t5xxl_fp16.safetensors")  # fmt: skip
    add("--tokenizer", metavar="DIR", help="tokenizer of T5 (default: in or beside --text-encoder)")
    add("--revision", metavar="NAME", help="branch, tag or commit of Hub sources that name none (default: main)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace a model folder that exists (default: refuse)")
    add("--dtype", choices=tuple(DTYPES), help="number format of all weights (default: that of the files; fp8 becomes "
        "bf16)")  # fmt: skip
    triple = {"type": number(int, 1), "nargs": 3, "metavar": ("F", "H", "W")}
    add("--window-size", **triple, help="window size in tokens: frames, rows, columns (default: 1 8 8)")
    add("--proxy-ratio", **triple, help="tokens per proxy token: frames, rows, columns (default: one proxy token "
        "per window)")  # fmt: skip
    add(
        "--num-heads", type=number(int, 1), metavar="N", help="attention heads (default: known for the official sizes)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert, and report what was inferred from the files.

    Raises:
        UserError: An input cannot be converted, or the output cannot be written; nothing is left behind.
    """
    if not (arguments.transformer or arguments.vae or arguments.text_encoder):
        raise UserError("give at least one of --transformer, --vae and --text-encoder")
    say_warnings()
    with interrupt_ends_at_once():
        silence_libraries()
        import torch

        from ptdit_diffusers.core.checkpoint_names import ConversionError

        from ..conversion.folder import convert

    with errors_of_writing(arguments.output, ConversionError):
        convert(
            arguments.output,
            transformer=arguments.transformer,
            vae=arguments.vae,
            text_encoder=arguments.text_encoder,
            tokenizer=arguments.tokenizer,
            revision=arguments.revision,
            overwrite=arguments.overwrite,
            dtype=getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None,
            window_size=tuple(arguments.window_size) if arguments.window_size else None,
            proxy_ratio=tuple(arguments.proxy_ratio) if arguments.proxy_ratio else None,
            num_heads=arguments.num_heads,
            report=say,
        )
    say(f"saved {arguments.output}")
