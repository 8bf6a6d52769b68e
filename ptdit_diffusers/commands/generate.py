"""`ptdit generate`: from a prompt to pictures, clips or views of an object that carry their own settings.

Everything that can be checked is checked before the model is loaded. It must not know the maths of the model.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from .loading import DTYPES, OFFLOADS, QUANTISED, Plan, check_plan, encode, load_rest
from .models import DEFAULT_MODEL, check_words, download, find_model
from .outputs import ANIMATED, CLIP, DEFAULTS, PICTURE, VIEWS, check_targets, output_files, save
from .terminal import (
    SIZE_STEP,
    UserError,
    clip_frames,
    first_line,
    interrupt_ends_at_once,
    number,
    pixels,
    say,
    say_warnings,
)

if TYPE_CHECKING:
    from .. import PTDiTPipeline
    from .outputs import Made

LARGEST_SEED = 2**63 - 1
MOST_FPS = 60
DEFAULT_FPS = 8  # of the file; the model knows no speed
PIXELS_PER_CALL = 8 * 256 * 256  # bounds the memory of one call; more pictures are made in several calls
LARGE_MODEL = 4 * 10**9  # bytes of weights from which fp32 asks too much of an ordinary machine


def add_command(commands: Any) -> None:
    """Add `generate` to the subcommands of the parser."""
    parser = commands.add_parser(
        "generate",
        help="turn a prompt into pictures, videos or views of an object",
        description="Turn a prompt into one or more pictures, videos or sets of views that carry their own settings.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what the picture shows, in quotes")
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="a model of this package, a folder, or a Hub id OWNER/NAME, which is then fetched (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FILE", help="PNG of a picture or a sheet of views; .mp4, .gif or .webp of a "
        "video or a turntable; without ending a folder of PNGs (default: ptdit.png, videos ptdit.webp)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse)")
    add(
        "--seed",
        type=number(int, 0, LARGEST_SEED),
        default=0,
        help="of the noise; picture i gets seed + i (default: 0)",
    )
    add("--num-images", type=number(int, 1), default=1, metavar="N", help="several go to FILE-0.png, ... (default: 1)")
    clip = parser.add_mutually_exclusive_group().add_argument
    clip("--num-frames", type=clip_frames, default=1, metavar="N", help="4n + 1 for a video (default: a picture)")
    clip("--num-views", type=number(int, 2), metavar="N", help="views of an object, view i from i * 360 / N degrees")
    add("--fps", type=number(int, 1, MOST_FPS), metavar="N", help=f"frames a second (default: {DEFAULT_FPS})")
    for side in ("--height", "--width"):
        add(side, type=pixels, metavar="PIXELS", help=f"multiple of {SIZE_STEP} (default: the model's own size)")
    add("--steps", type=number(int, 1), default=30, metavar="N", help="sampling steps (default: %(default)s)")
    add("--guidance", type=number(float, 0), default=4.0, help="guidance scale, 1 is off (default: %(default)s)")
    add("--negative-prompt", default="", metavar="TEXT", help="what to keep away from (default: nothing)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="number format (default: what suits the device)")
    add("--offload", choices=OFFLOADS, help="keep weights in memory until the GPU needs them: one component, or one "
        "layer at a time (default: all on the device)")  # fmt: skip
    add("--quantize", choices=QUANTISED, help="keep linear weights of text encoder and transformer in 8 bits; int8 "
        "needs torchao (default: as --dtype)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: a GPU if there is one")


def run(arguments: argparse.Namespace) -> None:
    """Check, choose, load, sample, save.

    Raises:
        UserError: Whatever the user can put right; the picture that failed leaves no file behind.
    """
    check_text(arguments)
    kind = VIEWS if arguments.num_views else CLIP if arguments.num_frames > 1 else PICTURE
    output = Path(DEFAULTS[kind]) if arguments.output is None else arguments.output
    targets = output_files(output, arguments.num_images, kind)
    animated = output.suffix.lower() in ANIMATED
    if arguments.fps and not animated:
        raise UserError(f"--fps {arguments.fps} says nothing of --output {output}, which does not move; leave it out")
    check_targets(targets, arguments.overwrite)
    check_seeds(arguments.seed, arguments.num_images)
    with interrupt_ends_at_once():
        plan = prepare(arguments)
        text = encode_text(plan, arguments)
        pipe = load_rest(plan)
    chosen = {name: value for name, value in plan._asdict().items() if name != "folder" and value}
    start, fps = time.monotonic(), arguments.fps or DEFAULT_FPS
    for target, (seed, made) in zip(targets, sample(pipe, text, arguments), strict=True):
        facts = facts_of(arguments, seed, made) | chosen | ({"fps": fps} if animated else {})
        save(made, target, facts, arguments.overwrite, fps)
        parts = "" if kind == PICTURE else f"{len(made)} {'views' if kind == VIEWS else 'frames'} of "
        size = f"{facts['width']}x{facts['height']}" + (f" at {fps} fps" if animated else "")
        say(f"saved {target}: {parts}{size}, seed {seed}, {time.monotonic() - start:.1f} s")


def prepare(arguments: argparse.Namespace) -> Plan:
    """Find and check the model, choose device and number format, and say so.

    Returns:
        How to load it.
    """
    say_warnings()
    folder = find_model(arguments.model)
    if folder is not None:
        check_words(folder, arguments.prompt, arguments.negative_prompt)
    device = choose_device(arguments.device)
    check_plan(arguments.offload, arguments.quantize, device.name)
    if folder is None:
        folder = download(arguments.model)
        check_words(folder, arguments.prompt, arguments.negative_prompt)
    dtype = choose_dtype(arguments.dtype, device.name, folder)
    memory = "".join(f", {name}: {getattr(arguments, name)}" for name in ("offload", "quantize")
                     if getattr(arguments, name))  # fmt: skip
    say(f"model: {arguments.model}, device: {device.name} ({device.why}), dtype: {dtype.name} ({dtype.why}){memory}")
    return Plan(folder, device.name, dtype.name, arguments.offload, arguments.quantize)


# --- checks before anything is loaded --------------------------------------------------------------------------------


def check_text(arguments: argparse.Namespace) -> None:
    """Refuse a prompt that says nothing or that a file cannot hold."""
    if not arguments.prompt.strip():
        raise UserError('the prompt is empty; say what the picture shows, such as "a red circle above a blue star"')
    for name, text in (("prompt", arguments.prompt), ("negative prompt", arguments.negative_prompt)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the shell that are no text in its encoding
            raise UserError(f"the {name} {text!r} holds bytes that are not text") from None


def check_seeds(seed: int, count: int) -> None:
    """Refuse a first seed from which the seeds of later pictures would run over the largest one."""
    if seed + count - 1 > LARGEST_SEED:
        raise UserError(
            f"--seed {seed} with {count} pictures passes the largest seed; nearest: {LARGEST_SEED - count + 1}"
        )


# --- choices ---------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """What was chosen, and why."""

    name: str
    why: str


def choose_device(asked: str) -> Choice:
    """Choose where to compute: what was asked for if torch can use it, else the best there is."""
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        name = next(name for name in usable if usable[name])
        found = {"cuda": "a CUDA GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU that torch can use"}
        return Choice(name, f"auto: {found[name]}")
    if not usable[asked]:
        names = ", ".join(name for name in usable if usable[name])
        raise UserError(f"--device {asked}: torch {torch.__version__} finds no such device here; usable: {names}")
    return Choice(asked, "as asked")


def choose_dtype(asked: str, device: str, folder: Path) -> Choice:
    """Choose the number format: what was asked for, else what is safe and fast on the device for this model."""
    import torch

    if asked != "auto":
        return Choice(asked, "as asked")
    if (
        device != "cuda"
        and (size := sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))) > LARGE_MODEL
    ):
        return Choice("bf16", f"auto: a model of {size / 10**9:.1f} GB, too large for fp32")
    if device != "cuda":
        return Choice("fp32", f"auto: the safe choice on {device}")
    if torch.cuda.get_device_capability()[0] >= 8:  # Ampere and later
        return Choice("bf16", "auto: this GPU computes in bf16")
    return Choice("fp32", "auto: this GPU has no bf16, and fp16 can overflow")


# --- pictures, clips, views ------------------------------------------------------------------------------------------


def encode_text(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode the prompt, and the negative one where guidance is on."""
    try:
        return encode(plan, arguments.prompt, arguments.negative_prompt, arguments.guidance > 1)
    except (ValueError, RuntimeError) as error:  # a folder without text encoder, numbers that overflowed, no memory
        raise UserError(first_line(error)) from error


def sample(pipe: "PTDiTPipeline", text: dict[str, Any], arguments: argparse.Namespace) -> Iterator[tuple[int, "Made"]]:
    """Make the pictures, clips or sets of views, several in one call where they are small.

    Clips are decoded in tiles where one is longer or larger than a tile, so that memory does not grow with length.

    Yields:
        The seed and what was made from it, in the order of the seeds.
    """
    import torch

    default_height, default_width = pipe.default_size()
    height, width = arguments.height or default_height, arguments.width or default_width
    if arguments.num_frames > 1:
        pipe.vae.enable_tiling()
    latent_frames = arguments.num_views or (arguments.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    at_once = max(1, PIXELS_PER_CALL // (height * width * latent_frames))
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        try:
            output = pipe(
                **text,
                height=height,
                width=width,
                num_frames=arguments.num_frames,
                num_views=arguments.num_views,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                num_images_per_prompt=len(some),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in some],
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of GPU memory; try a smaller --height and --width, fewer frames, or --device cpu"
            ) from error
        except (ValueError, RuntimeError) as error:  # what the pipeline refuses, numbers that overflowed, no memory
            raise UserError(first_line(error)) from error
        yield from zip(some, output[0], strict=True)  # the one of images, frames and views that is there


def facts_of(arguments: argparse.Namespace, seed: int, made: "Made") -> dict[str, Any]:
    """What made this picture or clip: enough to make it again with one command."""
    import diffusers
    import torch
    import transformers

    clip = {"num_views": arguments.num_views} if arguments.num_views else {"num_frames": arguments.num_frames}
    image = made[0] if isinstance(made, list) else made
    return {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": seed,
        "height": image.height,
        "width": image.width,
        **(clip if isinstance(made, list) else {}),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "model": arguments.model,
        "ptdit": __version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
