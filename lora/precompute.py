"""Encode pictures and captions once, so that training needs neither the VAE nor the text encoder.

    python -m lora.precompute --config 24gb --data DIR --cache-dir runs/cache

Training does the same at its start; this is for doing it on another machine or ahead of time.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from .base import BaseModel, from_hub
from .cache import Cache
from .config import LoRASettings, make_parser, read_settings
from .dataset import Findings, as_prior, bucket_sizes, find_items, table
from .validate import generate_prior

logger = logging.getLogger("lora")


def fill_cache(settings: LoRASettings, base: BaseModel, accelerator: Accelerator) -> Cache:
    """Bring the cache up to date with the data and log what was found; without `data` it is used as it is.

    Raises:
        ValueError: There is nothing to train on, or the cache belongs to another model.
    """
    folder = settings.cache_folder
    if accelerator.is_main_process:
        cache = Cache(folder, base, settings.rebuild_cache)
        if settings.data:
            findings = find_data(settings, base, accelerator)
            logger.info("%s", table(findings, settings.repeats, settings.prior_repeats))
            captions = ["", *settings.validation_prompts]
            cache.fill(findings.items, captions, settings.flip, accelerator.device)
        else:
            logger.info("training from the cache %s alone", folder)
            cache.samples()
            cache.add_captions(["", *settings.validation_prompts], accelerator.device)
    accelerator.wait_for_everyone()
    return Cache(folder, base)


def find_data(settings: LoRASettings, base: BaseModel, accelerator: Accelerator) -> Findings:
    """Return all items of the run, including those that the base model generates."""
    sizes = bucket_sizes(
        settings.resolution or base.own_resolution, settings.bucket_step or base.window_pixels, settings.max_aspect
    )
    source = settings.data
    if source.startswith("hub:"):
        source = str(from_hub("data", source.removeprefix("hub:"), "dataset"))
    downloaded = settings.data.startswith("hub:")  # never reads files of this machine
    findings = find_items(
        source,
        settings.default_caption,
        settings.trigger,
        settings.num_frames,
        sizes,
        settings.outside_files and not downloaded,
        settings.caption_column,
        (Path(settings.output_dir), settings.cache_folder),
    )
    if settings.prior_prompts:
        prior = find_items(str(generate_prior(base, settings, accelerator.device)), "", "", 1, sizes)
        findings.items += as_prior(prior.items)
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2 for bad input)."""
    flags = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        flags.output_dir = flags.output_dir or (str(Path(flags.cache_dir).parent) if flags.cache_dir else None)
        settings = read_settings(flags)
        cache = fill_cache(settings, BaseModel(settings.base), Accelerator())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"lora: {error}\n")
        return 2
    logger.info("%d samples in %s", len(cache.samples()), cache.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
