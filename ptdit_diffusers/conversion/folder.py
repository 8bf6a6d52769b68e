"""Write a diffusers folder from checkpoint files.

All checks come first. Then everything goes into a hidden folder beside the output, which is renamed when it is
complete. Independent of names of weights and of file formats.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ptdit_diffusers.core.checkpoint_names import ConversionError
from ptdit_diffusers.core.diffusion import OFFICIAL_SCHEDULER
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.core.folder_files import first_foreign, is_model_file, new_folder
from ptdit_diffusers.core.sizes import OFFICIAL_BASE_TOKENS

from ..models.class_transformer import ClassTransformer2DModel
from ..models.transformer_diffit import DiffiT2DModel
from .containers import Facts, Weights
from .dit import is_image_vae, label_names, plan_class_transformer, plan_image_vae, system_of
from .hub import locate
from .networks import Part, Triple, plan_transformer, plan_vae
from .text import WIDTHS, find_tokenizer, load_tokenizer, plan_text_encoder
from .writing import bytes_of, plan_dtypes, write_weights

OTHER_BYTES = 20 * 10**6  # tokenizer and configurations, generously
LIBRARIES = {"text_encoder": "transformers", "tokenizer": "transformers"}  # all others are diffusers'


def convert(
    output: Path,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    window_size: Triple | None = None,
    proxy_ratio: Triple | None = None,
    num_heads: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert checkpoint files to a folder that `PTDiTPipeline.from_pretrained` or `ClassToImagePipeline`'s loads.

    The transformer's file decides which of them. Components that are not given are null in `model_index.json`.

    Args:
        output: Folder to create.
        transformer, vae: Checkpoint files (torch or safetensors), or indexes of sharded ones. Each source may also be
            on the Hub: OWNER/NAME[@REVISION][:PATH]. It is then fetched into the Hub's cache.
        text_encoder: Folder or file of a T5. DiT and DiffiT have none.
        tokenizer: Folder of its tokenizer; None looks in and beside `text_encoder`.
        revision: Branch, tag or commit of Hub sources that name none; None is main.
        overwrite: Replace a model folder that exists.
        dtype: Number format of all weights; None keeps what the files have, and fp8 becomes bf16.
        window_size, proxy_ratio: Tokens per window and per proxy (frames, rows, columns); see `plan_transformer`.
        num_heads: Heads of the transformer; None takes those that its file carries, else those of the known size.
        report: Receives a line for everything that was found or written.

    Raises:
        ConversionError: An input cannot be converted, or the output exists. Nothing was written.
        OSError: Writing failed. Nothing is left behind.
    """
    output = Path(os.path.abspath(output))
    sources = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    if transformer is vae is text_encoder is None:
        raise ConversionError("nothing to convert; give a transformer, a VAE or a text encoder")
    check_output(output, overwrite, [Path(source) for source in sources.values() if source is not None])
    places = {name: locate(str(source), name, revision, report) for name, source in sources.items() if source}
    parts = plan_parts(places, num_heads, window_size, proxy_ratio)
    check_together(parts)
    folder = find_tokenizer(places.get("tokenizer"), places.get("text_encoder"))
    loaded_tokenizer = None if folder is None else load_tokenizer(folder)
    planned = {name: plan_dtypes(part.weights, dtype) for name, part in parts.items()}
    check_space(output, planned)
    for name, part in parts.items():
        for fact in part.facts:
            report(fact)
        formats = " and ".join(sorted({str(facts.dtype).removeprefix("torch.") for facts in planned[name].values()}))
        size = sum(bytes_of(facts) for facts in planned[name].values())
        report(f"{name.replace('_', ' ')}: will be {formats}, {size / 10**9:.2f} GB")
    if folder is not None:
        report(f"tokenizer: {folder}")
    target = pipeline_of(parts)
    write_folder(output, overwrite, parts, planned, target, loaded_tokenizer, report)
    present = {*parts, *([] if loaded_tokenizer is None else ["tokenizer"])}
    absent = [name for name in target.components if name not in present]
    if absent:
        arguments = ", ".join(f"{name}=..." for name in absent)
        report(
            f"the folder has no {', '.join(absent).replace('_', ' ')} (null in model_index.json), because none was "
            f"given; load it with {target.class_name}.from_pretrained(folder, {arguments})"
        )


def plan_parts(
    places: dict[str, Path], num_heads: int | None, window_size: Triple | None, proxy_ratio: Triple | None
) -> dict[str, Part]:
    """Open and check the components that are given.

    Raises:
        ConversionError: A file cannot be read, is not what it should be, or options do not fit it.
    """
    parts: dict[str, Part] = {}
    carried: dict[str, Any] = {}
    of_classes = system_of(Weights(places["transformer"]).facts) if "transformer" in places else None
    if of_classes is not None:
        given = {
            "--window-size": window_size,
            "--proxy-ratio": proxy_ratio,
            "--text-encoder": places.get("text_encoder"),
        }
        for option in [option for option, value in given.items() if value is not None]:
            raise ConversionError(
                f"{places['transformer']} is a {of_classes.name}, which {option} does not fit; leave it out"
            )
        parts["transformer"] = plan_class_transformer(of_classes, places["transformer"], num_heads)
    elif "transformer" in places:
        parts["transformer"] = plan_transformer(places["transformer"], num_heads, window_size, proxy_ratio)
        carried = parts["transformer"].weights.carried_config("transformer")
    if "vae" in places and of_classes is not None and is_image_vae(places["vae"]):
        parts["vae"] = plan_image_vae(places["vae"])
    elif "vae" in places:
        parts["vae"] = plan_vae(places["vae"], carried.get("latent_scale"))
    if "text_encoder" in places:
        parts["text_encoder"] = plan_text_encoder(places["text_encoder"])
    return parts


@dataclass
class Target:
    """The pipeline that a folder is for.

    Attributes:
        class_name: Name of its class.
        components: Names of its components besides the scheduler, in the order of messages.
        scheduler: Its scheduler.
        settings: Its other arguments, as `model_index.json` has them.
    """

    class_name: str
    components: tuple[str, ...]
    scheduler: Any
    settings: dict[str, Any] = field(default_factory=dict)


def pipeline_of(parts: dict[str, Part]) -> Target:
    """Return the pipeline for these components."""
    transformer = parts.get("transformer")
    if transformer is not None and isinstance(transformer.model, ClassTransformer2DModel):
        config = transformer.model.config
        learned = config.out_channels == 2 * config.in_channels
        scheduler = DDPMScheduler(**OFFICIAL_SCHEDULER | ({} if learned else {"variance_type": "fixed_large"}))
        settings = {"guidance_channels": 3, "id2label": label_names(transformer.weights.path)}
        settings |= diffit_guidance(config.sample_size) if isinstance(transformer.model, DiffiT2DModel) else {}
        return Target("ClassToImagePipeline", ("transformer", "vae"), scheduler, settings)
    carried = {} if transformer is None else transformer.weights.carried_config("transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_image_seq_len=carried.get("base_tokens", OFFICIAL_BASE_TOKENS),
    )
    return Target("PTDiTPipeline", ("transformer", "vae", "text_encoder", "tokenizer"), scheduler)


def diffit_guidance(sample_size: int) -> dict[str, Any]:
    """Return the guidance that the official code chooses by the size of latents, with the official strengths."""
    if sample_size <= 32:
        return {"guidance_scale": 4.4, "guidance_schedule": "power_cosine", "guidance_power": 4.0}
    return {"guidance_scale": 1.49, "guidance_schedule": "constant"}


# --- checks before anything is written -------------------------------------------------------------------------------


def check_output(output: Path, overwrite: bool, inputs: list[Path], others: tuple[str, ...] = ()) -> None:
    """Refuse an output that exists, unless it may be replaced: a model's own files and `others`, no input in it."""
    if not output.parent.is_dir():
        raise ConversionError(f"there is no folder {output.parent}; make it or name another one")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ConversionError(f"{output} exists; name another folder, or add --overwrite to replace it")
    if output.is_symlink() or not output.is_dir():
        raise ConversionError(f"{output} is not a folder, so it is not replaced; name another one")
    if any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise ConversionError(f"{output} holds something else than a model, so it is not replaced; name another one")
    foreign = first_foreign(output, lambda name: is_model_file(name) or name in others)
    if foreign is not None:
        raise ConversionError(
            f"{output} holds {foreign}, which this command does not write, so it is not replaced; move it away"
        )
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConversionError(f"{path} lies in the folder {output} that would be replaced; name another output")


def check_together(parts: dict[str, Part]) -> None:
    """Refuse components that do not fit each other."""
    transformer = parts.get("transformer")
    if transformer is None:
        return
    wanted = transformer.model.config.get("caption_channels")
    if "text_encoder" in parts and parts["text_encoder"].model.config.d_model != wanted:
        part = parts["text_encoder"]
        needed = f"{WIDTHS[wanted]}, " if wanted in WIDTHS else ""
        raise ConversionError(
            f"{part.weights.path} is a T5 of width {part.model.config.d_model}, but the transformer reads text of "
            f"width {wanted}; it needs the T5 that it was trained with ({needed}width {wanted})"
        )
    wanted = transformer.model.config.in_channels
    if "vae" in parts and (found := latent_channels(parts["vae"])) != wanted:
        path = parts["vae"].weights.path
        raise ConversionError(f"{path} has {found} latent channels, but the transformer has {wanted}")


def latent_channels(vae: Part) -> int:
    """Return the latent channels of a VAE for videos or images."""
    return vae.model.config.get("z_channels") or vae.model.config.get("latent_channels")


def check_space(output: Path, planned: dict[str, dict[str, Facts]]) -> None:
    """Refuse to start when the disk has too little room."""
    needed = OTHER_BYTES + sum(bytes_of(facts) for plan in planned.values() for facts in plan.values())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ConversionError(
            f"{output.parent} has {free / 10**9:.2f} GB of free space, and {needed / 10**9:.2f} GB are needed; "
            "make room or name another folder"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_folder(
    output: Path,
    overwrite: bool,
    parts: dict[str, Part],
    planned: dict[str, dict[str, Facts]],
    target: Target,
    tokenizer: Any,
    report: Callable[[str], None],
) -> None:
    """Write all components, then `model_index.json`."""
    with new_folder(output, lambda: check_output(output, overwrite, [])) as unfinished:
        for name, part in parts.items():
            folder = unfinished / name
            folder.mkdir()
            report(f"writing the {name.replace('_', ' ')}")
            write_config(folder, part, planned[name])
            write_weights(folder, part.stem, part.weights, planned[name])
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished / "tokenizer")
        target.scheduler.save_pretrained(unfinished / "scheduler")
        index = model_index({name: part.model for name, part in parts.items()}, target, tokenizer)
        replace_json(unfinished / "model_index.json", index)


def write_config(folder: Path, part: Part, planned: dict[str, Facts]) -> None:
    """Write the `config.json` of a component, as its own library does."""
    if part.folder == "text_encoder":
        formats = [facts.dtype for facts in planned.values()]
        part.model.config.dtype = max(set(formats), key=formats.count)
        part.model.config.architectures = [type(part.model).__name__]
        part.model.config.save_pretrained(folder)
    else:
        part.model.save_config(folder)


def model_index(models: dict[str, Any], target: Target, tokenizer: Any) -> dict[str, Any]:
    """Return the content of `model_index.json`; our classes are named as diffusers', where they are registered."""
    index: dict[str, Any] = {"_class_name": target.class_name, "_diffusers_version": diffusers.__version__}
    components = models | {"scheduler": target.scheduler, "tokenizer": tokenizer}
    for name in sorted(["scheduler", *target.components]):
        component = components.get(name)
        present = [LIBRARIES.get(name, "diffusers"), type(component).__name__]
        index[name] = [None, None] if component is None else present
    return index | target.settings
