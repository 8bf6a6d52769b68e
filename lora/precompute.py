"""Encode pictures and captions once, so that training needs neither the VAE nor the text encoder.

    python -m lora.precompute --config 24gb --data DIR --cache-dir runs/cache

Training does the same at its start; this is for doing it on another machine or ahead of time.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ptdit_diffusers.core.messages import log_to_terminal
from ptdit_diffusers.training.base_model import BaseModel, from_hub
from ptdit_diffusers.training.checkpoint import checkpoints
from ptdit_diffusers.training.command import exit_code
from ptdit_diffusers.training.data.buckets import bucket_sizes, nearest_size
from ptdit_diffusers.training.data.captions import CaptionChoices
from ptdit_diffusers.training.data.duplicates import grouped
from ptdit_diffusers.training.data.find import Findings, Item, find_items, table
from ptdit_diffusers.training.data.shards import held_out
from ptdit_diffusers.training.processes import main_process_does

from .cache import Cache, makers
from .command_line import make_parser, read_settings
from .config import LoRASettings
from .samples import (
    Sample,
    changes,
    from_json,
    list_path,
    read_samples,
    recorded_samples,
    to_json,
    write_samples,
)
from .validate import generate_prior, read_prompts

logger = logging.getLogger("lora")

RUN_SAMPLES = "samples.json"  # in the folder of a run
DATA_SETTINGS = ("default_caption", "trigger", "caption_column", "max_aspect", "num_frames", "flip")
FURTHER = (  # the same, but only named where they are not the default
    "caption_extension shuffle_caption keep_tokens keep_tokens_separator caption_separator caption_tag_dropout_rate "
    "enable_wildcard text_variations skip_image_resolution random_crop image_variations alpha_mask fps "
    "frame_extraction"
).split()


def fill_cache(settings: LoRASettings, base: BaseModel, accelerator: Accelerator) -> Cache:
    """Bring the cache up to date with the data and log what was found; without `data` it is used as it is.

    All processes call this; the main process does the work.

    Raises:
        ValueError: There is nothing to train on, or a resumed run would go on with other data.
    """
    filled: list[Cache] = []

    def fill() -> list[dict[str, Any]]:
        filled.append(Cache(settings.cache_folder, base, settings.rebuild_cache, settings.train_text_encoder))
        choose_samples(settings, base, accelerator.device, filled[0])
        return to_json(filled[0].samples)

    samples = main_process_does(accelerator, settings.cache_folder, fill)
    cache = filled[0] if filled else Cache(settings.cache_folder, base, tokens=settings.train_text_encoder)
    cache.require_samples(from_json(samples))
    return cache


def choose_samples(settings: LoRASettings, base: BaseModel, device: torch.device, cache: Cache) -> None:
    """Give the cache the samples of this run and everything that it lacks of them."""
    run, data = Path(settings.output_dir) / RUN_SAMPLES, data_settings(settings, base)
    prompts = settings.shown_texts
    goes_on = settings.resume and run.is_file() and checkpoints(run.parent)
    before = read_samples(run)[0] if goes_on else None
    if settings.data or settings.datasets:
        items, samples = plan_data(settings, base, device, cache)
        refuse_changes(settings, before, samples)
        cache.fill(items, samples, prompts, device)
        write_samples(list_path(cache.folder, data), samples, data)
    else:
        logger.info("training from the cache %s alone", cache.folder)
        samples = before or recorded_samples(cache.folder, data)
        cache.require_samples(samples)
        cache.add_captions(dict.fromkeys(prompts, ""), device)


def plan_data(
    settings: LoRASettings, base: BaseModel, device: torch.device, cache: Cache
) -> tuple[list[Item], list[Sample]]:
    """Return the files of all data sets and what is trained on of them, and log what was found.

    Raises:
        ValueError: One has nothing to train on, or no sample can be held out.
    """
    items: list[Item] = []
    samples: list[Sample] = []
    for number, each in enumerate(settings.data_sets()):
        findings = find_data(each, base)
        if number == 0:
            findings.items += prior_items(settings, base, device)
        if settings.datasets:
            logger.info("data set %d: %s%s", number + 1, each.data, " (pictures to keep)" if each.is_reg else "")
        logger.info("%s", table(findings, each.repeats, settings.prior_repeats))
        found = [varied(item, each) for item in findings.items]
        if several := sum(len({item.caption, *item.variations}) > 1 for item in found):
            logger.info("%d captions are read in several forms, up to %d", several, each.text_variations)
        items += found
        for prior, flip in ((False, each.flip), (True, settings.flip)):  # those of the base model are the last
            samples += cache.plan([item for item in found if item.prior == prior], flip, number)
    return items, hold_out(settings, items, samples)


def varied(item: Item, settings: LoRASettings) -> Item:
    """Return a file with its crops and the forms of its caption that are trained on."""
    if item.prior:
        return item
    if settings.random_crop:
        item = item.cropped(settings.image_variations, settings.seed)
    forms = CaptionChoices.of(settings).variations(item.caption, settings.text_variations, settings.seed)
    return replace(item, caption=forms[0], variations=tuple(forms[1:]))


def hold_out(settings: LoRASettings, items: list[Item], samples: list[Sample]) -> list[Sample]:
    """Return the samples, some of them marked as held out: whole groups of near-duplicates, chosen by the seed.

    Raises:
        ValueError: They are too few, or all alike.
    """
    if not settings.validation_split:
        return samples
    sets = settings.data_sets()
    new = [i for i, sample in enumerate(samples) if not sample.prior and not sets[sample.data_set].is_reg]
    groups = grouped(np.array([items[i].hashes for i in new], np.uint64))
    hidden = {new[i] for i in np.flatnonzero(held_out(groups, settings.validation_split, settings.seed))}
    if not hidden:
        kinds = len(set(groups.tolist()))
        raise ValueError(
            f"validation_split={settings.validation_split:g} leaves none of {len(new)} pictures in {kinds} groups of "
            f"near-duplicates to train on; nearest: {len(new) - 1 if kinds > 1 else '0, which holds out none'}."
        )
    return [replace(sample, held_out=i in hidden) for i, sample in enumerate(samples)]


def refuse_changes(settings: LoRASettings, before: list[Sample] | None, now: list[Sample]) -> None:
    """Raise ValueError where a resumed run has other samples than it began with, unless that is accepted."""
    changed = changes(before, now) if before is not None else []
    if changed and not settings.accept_changes:
        raise ValueError(
            f"the data changed since this run began: {'; '.join(changed)}. Put them back, go on all the same with "
            "--accept-changes, or start anew in another output_dir."
        )
    if changed:
        logger.warning("going on with changed data: %s", "; ".join(changed))


def data_settings(settings: LoRASettings, base: BaseModel) -> dict[str, Any]:
    """Return what decides about the samples of a run, as the cache's list of them says it."""
    if settings.datasets:
        sets = [data_settings(each, base) for each in settings.data_sets()]
        return {"sets": sets, "source": ", ".join(each.pop("source") for each in sets)} | prior_settings(settings)
    found = {name: getattr(settings, name) for name in DATA_SETTINGS}
    found |= {f"maker of {kind}": maker for kind, maker in makers(base).items()}
    found["resolution"] = settings.resolution or base.own_resolution
    found["bucket_step"] = settings.bucket_step or base.window_pixels
    defaults = {field.name: field.default for field in fields(settings)}
    found |= {name: value for name in FURTHER if (value := getattr(settings, name)) != defaults[name]}
    found |= prior_settings(settings)
    is_local = not settings.data.startswith("hub:")
    found["source"] = str(Path(settings.data).resolve()) if settings.data and is_local else settings.data
    return found


def prior_settings(settings: LoRASettings) -> dict[str, Any]:
    """Return what decides about the pictures of the base model, and about what is held out."""
    prompts = read_prompts(settings.prior_prompts)
    found: dict[str, Any] = {"prior": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16] if prompts else ""}
    split = {"validation_split": settings.validation_split, "seed": settings.seed}
    return found | (split if settings.validation_split else {})


def run_sizes(settings: LoRASettings, base: BaseModel) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of buckets.

    Raises:
        ValueError: `resolution` or `bucket_step` is not possible; names the nearest.
    """
    token, step = 8 * base.transformer_config["patch_size"], settings.bucket_step or base.window_pixels
    if step % token:
        low = max(token, step // token * token)
        raise ValueError(
            f"bucket_step={step} is not a multiple of {token} (VAE 8 x patch {token // 8}); nearest: {low} or "
            f"{low + token}; one window of this model is {base.window_pixels}."
        )
    return bucket_sizes(settings.resolution or base.own_resolution, step, settings.max_aspect)


def find_data(settings: LoRASettings, base: BaseModel) -> Findings:
    """Return the files of one data set."""
    sizes, source = run_sizes(settings, base), settings.data
    if source.startswith("hub:"):
        source = str(from_hub("data", source.removeprefix("hub:"), "dataset"))
    downloaded = settings.data.startswith("hub:")  # never reads files of this machine
    return find_items(
        source,
        settings.default_caption,
        settings.trigger,
        settings.num_frames,
        sizes,
        settings.outside_files and not downloaded,
        settings.caption_column,
        (Path(settings.output_dir), settings.cache_folder),
        caption_extension=settings.caption_extension,
        skip_image_resolution=settings.skip_image_resolution,
        alpha_mask=settings.alpha_mask,
        fps=settings.fps,
        all_pieces=settings.frame_extraction == "chunk",
    )


def prior_items(settings: LoRASettings, base: BaseModel, device: torch.device) -> list[Item]:
    """Return the pictures of `prior_prompts`, which the base model generates where they lack."""
    if not settings.prior_prompts:
        return []
    height, width = nearest_size(1, 1, run_sizes(settings, base))
    return [
        Item(path, prompt, 1, height, width, prior=True, name=f"prior picture {index}")
        for index, (path, prompt) in enumerate(generate_prior(base, settings, device))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2 for bad input)."""
    return exit_code(lambda: precompute(arguments), "lora")


def precompute(arguments: Sequence[str] | None) -> int:
    """Fill the cache as the command line says; return the exit code.

    Raises:
        ValueError, OSError: Something is not right.
    """
    flags = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    log_to_terminal(logging.INFO)
    flags.output_dir = flags.output_dir or (str(Path(flags.cache_dir).parent) if flags.cache_dir else None)
    settings = read_settings(flags)
    cache = fill_cache(settings, BaseModel(settings.base), Accelerator())
    logger.info("%d samples in %s", len(cache.samples), cache.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
