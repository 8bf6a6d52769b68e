"""`ptdit generate`: from a prompt or a class to images, videos or views, saved with the settings that made them.

Everything that can be checked is checked before the model is loaded.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptdit_diffusers.core.few_steps import LORA_FILE
from ptdit_diffusers.core.sizes import LARGEST_SIDE

from .. import __version__
from .devices import check_share, connected, is_loss, must_start, share, start_processes
from .limits import PIXELS_PER_CALL, check_cost
from .loading import DTYPES, OFFLOADS, QUANTIZED, Plan, check_parts, check_plan, encode, load, load_rest
from .loras import LoRA, find_loras, read_lora
from .models import (
    CLASS_STEPS,
    DEFAULT_MODEL,
    check_class,
    check_length,
    check_words,
    download,
    find_model,
    find_student,
    is_class_model,
)
from .outputs import ANIMATED, DEFAULTS, IMAGE, VIDEO, VIEWS, check_output, check_targets, output_files, save
from .terminal import (
    SIZE_STEP,
    UserError,
    first_line,
    frame_count,
    interrupt_ends_at_once,
    number,
    pixels,
    place_among,
    say,
    say_warnings,
)

if TYPE_CHECKING:
    from .. import ClassToImagePipeline, PTDiTPipeline
    from .outputs import Result

LARGEST_SEED = 2**63 - 1
LARGEST_SCALE = 100.0  # of a LoRA
MOST_FPS = 60
DEFAULT_FPS = 8  # of the file; the model knows no speed
STEPS = 30  # of prompts, by default
GUIDANCE = 4.0  # of prompts, by default
LARGE_MODEL = 4 * 10**9  # bytes of weights from which fp32 needs too much memory on an ordinary machine


def add_command(commands: Any) -> None:
    """Add `generate` to the subcommands of the parser."""
    parser = commands.add_parser(
        "generate",
        help="generate images, videos or views of an object from a prompt, or images of a class",
        description="Generate images, videos or views of an object from a prompt, or images of a class. The files "
        "carry their settings.",
        epilog='Example: ptdit generate "a red circle above a blue square" --output circle.png',
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the image shows, in quotes")
    group = parser.add_argument_group("what to generate")
    length, add = group.add_mutually_exclusive_group(), group.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="a model that comes with this package, a folder, or a "
        "Hugging Face Hub id OWNER/NAME, which is downloaded (default: %(default)s)")  # fmt: skip
    add("--class", dest="class_name", metavar="CLASS", help="name or number of a class in place of the prompt, for "
        "class-conditional models")  # fmt: skip
    add("--num-images", type=number(int, 1, LARGEST_SEED), default=1, metavar="N", help="number of images, videos "
        "or sets of views; several are saved as FILE-0.png, FILE-1.png, ... (default: 1)")  # fmt: skip
    length.add_argument("--num-frames", type=frame_count, default=1, metavar="N", help="frames of a video, 4n + 1 "
        "(default: 1, an image)")  # fmt: skip
    length.add_argument("--num-views", type=number(int, 2, LARGEST_SIDE), metavar="N", help="views of an object "
        "instead of one image; view i is seen from i * 360 / N degrees")  # fmt: skip
    for side in ("--height", "--width"):
        add(side, type=pixels, metavar="PIXELS", help=f"a multiple of {SIZE_STEP} (default: the model's own size)")
    add("--yes", action="store_true", help="try sizes that need more memory than there is, or more than a day, by "
        "estimate (default: refuse)")  # fmt: skip
    add = parser.add_argument_group("sampling").add_argument
    add("--seed", type=number(int, 0, LARGEST_SEED), default=0, help="seed of the noise; image i gets seed + i "
        "(default: 0)")  # fmt: skip
    add("--steps", type=number(int, 1), metavar="N", help=f"sampling steps (default: {STEPS}, of classes "
        f"{CLASS_STEPS}, of models without a VAE 18 or 40)")  # fmt: skip
    add("--guidance", type=number(float, 0), metavar="SCALE", help="how strongly to follow the prompt or class; 1 is "
        f"off and twice as fast (default: {GUIDANCE}, of classes what the model says)")  # fmt: skip
    add("--turbo", action="store_true", help="make each image in few steps without guidance, with the LoRA that an "
        "embedded model has for it")  # fmt: skip
    add("--lora", action="append", default=[], metavar="FILE", help="a LoRA: a .safetensors file, or a folder that "
        "ptdit lora wrote; may be given several times")  # fmt: skip
    add("--lora-scale", action="append", default=[], type=number(float, -LARGEST_SCALE, LARGEST_SCALE),
        metavar="SCALE", help="strength of each --lora, in the same order (default: 1)")  # fmt: skip
    add("--negative-prompt", default="", metavar="TEXT", help="what to avoid (default: nothing)")
    add = parser.add_argument_group("files").add_argument
    add("--output", type=Path, metavar="FILE", help=".png for an image or a contact sheet of views; .mp4, .gif or "
        ".webp for a video or rotating views; a name without ending for a folder of PNG files (default: ptdit.png, "
        "for a video ptdit.webp)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse)")
    add("--fps", type=number(int, 1, MOST_FPS), metavar="N", help=f"frames per second of .mp4, .gif and .webp "
        f"(default: {DEFAULT_FPS})")  # fmt: skip
    add = parser.add_argument_group("device and memory").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: auto, a "
        "GPU if there is one)")  # fmt: skip
    add("--devices", type=number(int, 1, 1024), metavar="N", help="share each picture among N GPUs of this "
        "machine, or N processes on the CPU (default: 1)")  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="number format (default: auto, what suits the "
        "device)")  # fmt: skip
    add("--offload", choices=OFFLOADS, help="keep weights in main memory until the GPU needs them: one model at a "
        "time, or one layer at a time (group, sequential) (default: all on the device)")  # fmt: skip
    add("--quantize", choices=QUANTIZED, help="keep the linear weights of text encoder and transformer in 8 bits; "
        "int8 needs torchao (default: as --dtype)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Check the arguments, load the model, generate and save.

    Raises:
        UserError: Whatever the user can put right; an image that failed leaves no file behind.
    """
    check_text(arguments)
    kind = VIEWS if arguments.num_views else VIDEO if arguments.num_frames > 1 else IMAGE
    output = Path(DEFAULTS[kind]) if arguments.output is None else arguments.output
    check_output(output, kind)
    if arguments.fps and output.suffix.lower() not in ANIMATED:
        raise UserError(
            f"--fps {arguments.fps} has no effect on --output {output}, which is not a .mp4, .gif or .webp; leave it "
            "out"
        )
    check_targets(output, arguments.num_images, arguments.overwrite)
    check_seeds(arguments.seed, arguments.num_images)
    find_loras(arguments.lora, arguments.lora_scale)  # refuses bad files before a model is downloaded
    if must_start(arguments.devices):
        with interrupt_ends_at_once():
            folder = find_model(arguments.model)
            if folder is not None:  # else it is on the Hub, and each process checks it
                check_subject(folder, arguments)
                check_share(folder, arguments, arguments.devices)
            device = choose_device(arguments.device)
        raise SystemExit(start_processes(arguments, device.name))
    with interrupt_ends_at_once():
        plan = prepare(arguments)
    with connected(plan.device):
        with interrupt_ends_at_once():
            subject, pipe = load_parts(plan, arguments)
            share(pipe, arguments)
        pipe.refuse_large_calls = False  # it was checked above
        write_results(pipe, subject, arguments, plan, output, kind)


def load_parts(plan: Plan, arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the arguments of the pipeline for the encoded prompt or the class, and the loaded pipeline."""
    if arguments.class_name is None:
        return encode_text(plan, arguments), load_rest(plan)
    return {"class_labels": arguments.class_name}, load(plan)


def write_results(
    pipe: Any, subject: dict[str, Any], arguments: argparse.Namespace, plan: Plan, output: Path, kind: str
) -> None:
    """Generate and save; of several processes that share the calls, the first saves."""
    targets = output_files(output, arguments.num_images)
    chosen = {name: value for name, value in plan._asdict().items() if name not in ("folder", "loras") and value}
    chosen |= {
        each.name: shown_name(each.file) + ("" if each.scale == 1 else f", scale {each.scale:g}")
        for each in plan.loras
    }
    begun, fps = time.monotonic(), arguments.fps or DEFAULT_FPS
    animated = output.suffix.lower() in ANIMATED
    for target, (seed, result) in zip(targets, generate(pipe, subject, arguments), strict=True):
        if place_among()[0]:
            continue
        metadata = metadata_of(arguments, seed, result) | chosen | ({"fps": fps} if animated else {})
        save(result, target, metadata, arguments.overwrite, fps)
        parts = "" if kind == IMAGE else f"{len(result)} {'views' if kind == VIEWS else 'frames'} of "
        size = f"{metadata['width']}x{metadata['height']}" + (f" at {fps} fps" if animated else "")
        say(f"saved {target}: {parts}{size}, seed {seed}, {time.monotonic() - begun:.1f} s")


def prepare(arguments: argparse.Namespace) -> Plan:
    """Find and check the model, choose device and number format, and report both.

    Returns:
        How to load it.
    """
    say_warnings()
    folder = find_model(arguments.model)
    if folder is not None:
        check_subject(folder, arguments)
    device = choose_device(arguments.device)
    check_plan(arguments.offload, arguments.quantize, device.name)
    if folder is None:
        folder = download(arguments.model)
        check_subject(folder, arguments)
    check_parts(folder)
    check_share(folder, arguments, place_among()[1])
    dtype = choose_dtype(arguments.dtype, device.name, folder)
    memory = "".join(f", {name}: {getattr(arguments, name)}" for name in ("offload", "quantize")
                     if getattr(arguments, name))  # fmt: skip
    say(f"model: {arguments.model}, device: {device.name} ({device.why}), dtype: {dtype.name} ({dtype.why}){memory}")
    plan = Plan(
        folder, device.name, dtype.name, arguments.offload, arguments.quantize, chosen_loras(folder, arguments)
    )
    if not arguments.yes:
        check_cost(plan, arguments)
    return plan


# --- checks before anything is loaded --------------------------------------------------------------------------------


def check_text(arguments: argparse.Namespace) -> None:
    """Refuse a prompt that is missing, empty or that a file cannot hold, and a class beside one."""
    if arguments.class_name is None and arguments.prompt is None:
        raise UserError(
            'give a prompt, for example "a red circle above a blue star", or with a class-conditional model --class'
        )
    if arguments.class_name is not None and arguments.prompt is not None:
        raise UserError("a prompt and --class exclude each other; leave one of them out")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError('the prompt is empty; describe the image, for example "a red circle above a blue star"')
    texts = {
        "prompt": arguments.prompt,
        "negative prompt": arguments.negative_prompt,
        "class": arguments.class_name,
    }
    for name, text in texts.items():
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError:  # bytes of the shell that are no text in its encoding
            raise UserError(f"the {name} {text!r} holds bytes that are not text") from None


def check_subject(folder: Path, arguments: argparse.Namespace) -> None:
    """Refuse a prompt, class or size that the model in a folder cannot generate; fill in its steps and guidance."""
    use_loras(chosen_loras(folder, arguments), arguments)
    if not is_class_model(folder):
        arguments.steps = arguments.steps or STEPS
        arguments.guidance = GUIDANCE if arguments.guidance is None else arguments.guidance
        if arguments.class_name is not None:
            raise UserError(f"--model {arguments.model} reads prompts, not classes; give a prompt in place of --class")
        check_words(folder, arguments.prompt, arguments.negative_prompt)
        check_length(folder, arguments.num_frames, arguments.num_views)
        return
    if arguments.class_name is None:
        raise UserError(f"--model {arguments.model} generates images of classes; give --class in place of the prompt")
    given = {
        "--negative-prompt": arguments.negative_prompt,
        "--num-frames": arguments.num_frames > 1,
        "--num-views": arguments.num_views,
    }
    for option in [option for option, value in given.items() if value]:
        raise UserError(f"{option} does not fit --model {arguments.model}, which generates images of classes")
    settings = check_class(folder, arguments.class_name)
    arguments.steps = arguments.steps or settings.steps
    arguments.guidance = settings.guidance if arguments.guidance is None else arguments.guidance
    only = settings.only_size
    for option in ("height", "width"):
        if only and (size := getattr(arguments, option)) not in (None, only):
            raise UserError(f"--{option} {size}: this model makes {only} x {only} only; nearest: {only}")
    if arguments.quantize and settings.network == "unet":
        raise UserError(
            f"--quantize does not fit --model {arguments.model}, whose network works on pixels; leave it out"
        )


def chosen_loras(folder: Path, arguments: argparse.Namespace) -> tuple[LoRA, ...]:
    """Return the LoRAs of `--lora`, and that of `--turbo`; refuse files that are none."""
    turbo = [read_lora(find_student(folder, arguments.model), 1.0, "turbo")] if arguments.turbo else []
    return (*turbo, *find_loras(arguments.lora, arguments.lora_scale))


def use_loras(loras: tuple[LoRA, ...], arguments: argparse.Namespace) -> None:
    """Fill in steps and guidance of a LoRA of few steps; refuse two of them, and weights that no LoRA can change."""
    if loras and arguments.quantize:
        option = "--turbo" if arguments.turbo else "--lora"
        raise UserError(f"{option} changes weights that --quantize keeps in 8 bits; leave one of them out")
    students = [each for each in loras if each.steps]
    if len(students) > 1:
        names = " and ".join(str(each.file) for each in students)
        raise UserError(f"{names} were both distilled for few steps; give one of them")
    for student in students:
        arguments.steps = arguments.steps or student.steps
        arguments.guidance = 1.0 if arguments.guidance is None else arguments.guidance


def check_seeds(seed: int, count: int) -> None:
    """Refuse a first seed from which the seeds of later images would pass the largest one."""
    if seed + count - 1 > LARGEST_SEED:
        raise UserError(
            f"--seed {seed} with {count} images passes the largest seed; nearest: {LARGEST_SEED - count + 1}"
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
    if asked != "auto":
        return Choice(asked, "as asked")
    from ptdit_diffusers.core.devices import computes_bf16

    if device != "cuda":
        size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        if size > LARGE_MODEL and (device == "cpu" or computes_bf16(device)):
            return Choice("bf16", f"auto: a model of {size / 10**9:.1f} GB, too large for fp32")
        return Choice("fp32", f"auto: the safe choice on {device}")
    if computes_bf16(device):
        return Choice("bf16", "auto: this GPU computes in bf16")
    return Choice("fp32", "auto: this GPU has no bf16, and fp16 can overflow")


# --- generation ------------------------------------------------------------------------------------------------------


def encode_text(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode the prompt, and the negative one if guidance is on."""
    try:
        return encode(plan, arguments.prompt, arguments.negative_prompt, arguments.guidance > 1)
    except (ValueError, RuntimeError) as error:  # a folder without text encoder, numbers that overflowed, no memory
        raise UserError(first_line(error)) from error


def generate(
    pipe: "PTDiTPipeline | ClassToImagePipeline", subject: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[tuple[int, "Result"]]:
    """Generate the images, videos or sets of views, several in one call where they are small.

    A video that is longer or larger than a tile is decoded in tiles, so that memory does not grow with its length.

    Args:
        pipe: The loaded pipeline.
        subject: Its arguments for the encoded prompt, or for the class.
        arguments: Those of the command.

    Yields:
        The seed and its result, in the order of the seeds.
    """
    import torch

    default_height, default_width = pipe.default_size()
    height, width = arguments.height or default_height, arguments.width or default_width
    if arguments.num_frames > 1:
        pipe.vae.enable_tiling()
    length, latent_frames = {}, 1
    if arguments.class_name is None:
        length = {"num_frames": arguments.num_frames, "num_views": arguments.num_views}
        latent_frames = arguments.num_views or (arguments.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    at_once = max(1, PIXELS_PER_CALL // (height * width * latent_frames))
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        try:
            output = pipe(
                **subject,
                **length,
                height=height,
                width=width,
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
            lost = "another device has ended; what it said comes before this line"
            raise UserError(lost if is_loss(error) else first_line(error)) from error
        yield from zip(some, output[0], strict=True)  # the one of images, frames and views that is not None


def shown_name(file: Path) -> str:
    """Return the name of a LoRA for the metadata of a picture, without the folders of this machine."""
    return file.parent.name if file.name == LORA_FILE else file.name


def metadata_of(arguments: argparse.Namespace, seed: int, result: "Result") -> dict[str, Any]:
    """Return the settings of one result, from which one command can generate it again."""
    import diffusers
    import torch
    import transformers

    length = {"num_views": arguments.num_views} if arguments.num_views else {"num_frames": arguments.num_frames}
    image = result[0] if isinstance(result, list) else result
    prompts = {"prompt": arguments.prompt, "negative_prompt": arguments.negative_prompt}
    return {
        **(prompts if arguments.class_name is None else {"class": arguments.class_name}),
        "seed": seed,
        "height": image.height,
        "width": image.width,
        **(length if isinstance(result, list) else {}),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "model": arguments.model,
        "ptdit": __version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
