"""What a run does before its transformer is trained: VAE, words, encoding of pictures and captions. All of it once."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory

from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.captions import CaptionChoices
from ptdit_diffusers.training.data.encode import PictureEncoder, say_what_is_lost
from ptdit_diffusers.training.data.media import UnreadableError, read_frames
from ptdit_diffusers.training.data.shards import FORMAT, Encoded, ShardWriter, merge, part_path, write_part
from ptdit_diffusers.training.data.sources import DataSource, Picture
from ptdit_diffusers.training.data.space import require_space
from ptdit_diffusers.training.own_data.card import data_notes, noted_version, vae_note
from ptdit_diffusers.training.own_data.model import make_base, stage_sizes
from ptdit_diffusers.training.own_data.settings import OwnDataSettings, RunSettings, by_source
from ptdit_diffusers.training.own_data.text import CachedText, OnlineText, cache_text, is_small
from ptdit_diffusers.training.own_data.vae import OwnVAESettings, OwnVAETask
from ptdit_diffusers.training.own_data.words import (
    WordSettings,
    WordTask,
    extend,
    has_word_list,
    needs_mark,
    report,
    unknown_words,
)
from ptdit_diffusers.training.processes import main_process_does
from ptdit_diffusers.training.run import Run

logger = logging.getLogger(__name__)

WORDS_SHOWN = 2000  # captions that are looked through for unknown words and long ones, where the encoder has no list


def source_of(settings: OwnDataSettings) -> DataSource:
    """Return the data of a run."""
    data = settings.data
    own = (settings.folder, settings.encoded)
    names = "source default_caption trigger caption_column licence_column group_column outside_files".split()
    return DataSource(**{name: getattr(data, name) for name in [*names, "caption_extension"]}, own=own)


# --- encoding --------------------------------------------------------------------------------------------------------


def maker_folder(settings: OwnDataSettings, base: BaseModel) -> Path:
    """Return where everything that one VAE encodes lies."""
    data, kind = settings.data, f"{FORMAT}-{base.fingerprint('vae')}"
    kind += ("-mirrored" if data.flip else "") + (f"-crops{data.crops}" if data.crops else "")
    return settings.encoded / (kind + ("-alpha" if data.alpha_mask else ""))


def encoding_name(settings: OwnDataSettings, base: BaseModel) -> str:
    """Return a name of an encoding: it changes with all that decides about its samples."""
    data = settings.data
    further = {name: value for name in ("num_views", "fps", "all_pieces") if (value := getattr(data, name))}
    return source_of(settings).encoding_name(
        {"sizes": stage_sizes(settings, base), "num_frames": data.num_frames, **further}
    )


def encode_part(
    settings: OwnDataSettings, base: BaseModel, device: torch.device, part: int = 0, parts: int = 1
) -> PictureEncoder:
    """Encode what one of several parts has to; what is there already is left as it is.

    Raises:
        ValueError: The source is not there, or too many files cannot be read.
        OSError: The disk is full.
    """
    sizes, source, folder = stage_sizes(settings, base), source_of(settings), maker_folder(settings, base)
    count = source.count()
    if count:
        pixels = sum(max(height * width for height, width in each) for each in sizes.values())
        frames, copies = settings.data.latent_frames, 2 * settings.data.copies
        require_space("data.encoded", folder, count // parts * frames * pixels // 64 * 4 * 2 * copies)
    prefix = f"{part:05d}-" if parts > 1 else ""
    writer = ShardWriter(folder, prefix, only=parts > 1)
    for problem in writer.bad:
        logger.warning("damaged, and made again: %s", problem)
    vae = base.load_vae(torch.float32, device)
    data = settings.data
    names = "num_frames num_views fps all_pieces flip crops alpha_mask max_skips".split()
    encoder = PictureEncoder(vae, writer, sizes, **{name: getattr(data, name) for name in names})
    encoder.encode(source.pictures(part, parts))
    name = encoding_name(settings, base)
    write_part(part_path(folder, name, part, parts), encoder.found, encoder.skipped)
    logger.info(
        "part %d of %d: %d pictures, %d of them encoded now, %d skipped",
        part,
        parts,
        len(encoder.found),
        encoder.encoded,
        len(encoder.skipped),
    )
    if encoder.without_caption:
        logger.warning(
            "%d of %d have no caption and get data.default_caption=%r",
            encoder.without_caption,
            len(encoder.found),
            data.default_caption,
        )
    if data.group_column and encoder.found and not any(each.group for each in encoder.found):
        logger.warning("no file has a %r (data.group_column), so none are held out together", data.group_column)
    return encoder


def merge_parts(settings: OwnDataSettings, base: BaseModel, parts: int) -> Path:
    """Write the index of all parts and return its folder.

    Raises:
        ValueError: Parts are missing, or nothing was encoded.
    """
    source, name = source_of(settings), encoding_name(settings, base)
    about = {"data": {**source.identity(), "flip": settings.data.flip, "num_frames": settings.data.num_frames}}
    return merge(maker_folder(settings, base), name, parts, {**about, "vae": base.fingerprint("vae")})


def count_parts(settings: OwnDataSettings, base: BaseModel) -> int:
    """Return in how many parts these data were encoded; 0 = they were not.

    Raises:
        ValueError: They were encoded in several divisions.
    """
    name = encoding_name(settings, base)
    found = {int(path.stem[-5:]) for path in (maker_folder(settings, base) / "parts").glob(f"{name}-*.jsonl")}
    if len(found) > 1:
        numbers = " and ".join(map(str, sorted(found)))
        raise ValueError(f"these data were encoded in {numbers} parts; remove the files of one division in parts/.")
    return found.pop() if found else 0


def encoded_versions(settings: OwnDataSettings, base: BaseModel, accelerator: Accelerator) -> list[Path]:
    """Return the version of the encoded data of each stage; what is not encoded yet, is encoded.

    A run keeps the versions that it began with.

    Raises:
        ValueError: There is nothing to train on, or the version of an earlier call is gone.
    """
    sources, notes = by_source(settings), data_notes(settings)
    versions = {
        source: encoded_version(each, base, accelerator, note)
        for (source, each), note in zip(sources.items(), notes, strict=True)
    }
    return [versions[stage.data or settings.data.source] for stage in settings.stages]


def encoded_version(settings: OwnDataSettings, base: BaseModel, accelerator: Accelerator, note: Path) -> Path:
    """Return the version of the encoded data of one source, whose name stands in the file `note`."""

    def work() -> str:
        if note.is_file():
            version = noted_version(settings, note)
            say_changes(settings, version)
            return str(version)
        if (parts := count_parts(settings, base)) > 1:
            version = merge_parts(settings, base, parts)
        else:
            encode_part(settings, base, accelerator.device)
            version = merge_parts(settings, base, 1)
        replace_json(note, {"version": version.relative_to(settings.encoded).as_posix()})
        free_memory()
        return str(version)

    return Path(main_process_does(accelerator, settings.folder, work))


def say_changes(settings: OwnDataSettings, version: Path) -> None:
    """Say how the files of a folder differ from those that a run began with; it goes on with those."""
    source = source_of(settings)
    if source.is_tars or not Path(source.source).exists():
        return
    encoded = Encoded(version, settings.stages[0].resolution)
    before = {encoded.caption_lines(number)["name"] for number in range(len(encoded.index))}
    now = {picture.name for picture in source.pictures() if not picture.problem}
    if before != now:
        logger.warning(
            "the data changed since this run began (%d new files, %d missing ones); it goes on with what it began "
            "with, and another output takes the new ones",
            len(now - before),
            len(before - now),
        )


# --- other parts of the model ----------------------------------------------------------------------------------------


@dataclass
class Limits:
    """What is left of `run.max_minutes` and `run.stop_after` in one call, all of its stages together."""

    ends: float  # time.monotonic(), seconds
    steps: float

    @classmethod
    def of(cls, run: RunSettings) -> "Limits":
        """Return the limits of a call that begins now."""
        ends = time.monotonic() + run.max_minutes * 60 if run.max_minutes else math.inf
        return cls(ends, run.stop_after or math.inf)

    def left(self) -> dict[str, float]:
        """Return what the settings of the loop say of them, where 0 is no limit."""
        minutes = max(1e-9, (self.ends - time.monotonic()) / 60)
        return {
            "max_minutes": 0.0 if self.ends == math.inf else minutes,
            "stop_after": 0 if self.steps == math.inf else int(self.steps),
        }

    def finish(self, run: Run) -> None:
        """Train a stage before the transformer to its end.

        Raises:
            StoppedEarlyError: A signal came, or nothing is left of a limit.
        """
        if not run.train() or run.must_stop({"now": False}):
            raise StoppedEarlyError
        self.steps -= run.step - run.first_step
        run.accelerator.free_memory()
        free_memory()


class StoppedEarlyError(Exception):
    """A stop signal or a limit came before the transformer."""


def prepare_parts(
    settings: OwnDataSettings, accelerator: Accelerator, limits: Limits | None = None
) -> dict[str, Path]:
    """Return the folders of the parts of the model that the run makes for itself; trains them where they are missing.

    Args:
        settings: Of the run.
        accelerator: Of the run.
        limits: Of this call; None = a call that begins now.

    Raises:
        ValueError: The text encoder has no list of words that could grow.
        StoppedEarlyError: A signal came, or nothing is left of a limit.
    """
    limits = limits or Limits.of(settings.run)
    base, parts = make_base(settings), {}
    if settings.vae.train != "no":
        parts["vae"] = trained_vae(settings, base, accelerator, limits) / "vae"
    if settings.text.grow and not has_word_list(base.part("tokenizer")):
        raise ValueError("text.grow is for text encoders with a list of words; this one reads any word: leave it out.")
    if settings.text.grow or needs_mark(base.part("tokenizer")):
        folder = grown_text(settings, base, accelerator, limits)
        parts |= {name: folder / name for name in ("tokenizer", "text_encoder")}
    return parts


def check_vae_source(settings: OwnDataSettings) -> None:
    """Look for the pictures of its own that the VAE will be trained on.

    Raises:
        ValueError: There is none, a table is not right, or files have no licence where they need one.
    """
    if not (own := settings.vae.source) or (settings.folder / "vae" / "export").is_dir():
        return
    try:
        replace(source_of(settings), source=own).count()
    except ValueError as error:
        raise ValueError(f"vae.source={own!r}: {error}") from error
    pictures_of(settings, 1)


def pictures_of(settings: OwnDataSettings, most: int) -> list[Picture]:
    """Return pictures for the VAE that can be read, at most so many.

    Raises:
        ValueError: There is none.
    """
    found, problems, own = [], [], settings.vae.source
    pictures = replace(source_of(settings), source=own).pictures(tars=8) if own else all_pictures(settings, tars=8)
    for picture in pictures:
        if len(found) == most:
            break
        try:
            if picture.problem:
                raise UnreadableError(picture.problem)
            read_frames(picture.file, 1)
            found.append(picture)
        except UnreadableError as error:  # the encoding names those of the data
            problems.append(f"{picture.name} {error}")
    if not found:
        where, reasons = f"vae.source={own!r}" if own else f"data {settings.data.source!r}", "; ".join(problems[:3])
        raise ValueError(f"{where} holds no picture that can be read{reasons and f': {reasons}'}.")
    return found


def all_pictures(settings: OwnDataSettings, tars: int) -> Iterator[Picture]:
    """Yield the pictures of all sources; of tars, of so many of each."""
    for each in by_source(settings).values():
        yield from source_of(each).pictures(tars=tars)


def loop_settings(settings: OwnDataSettings, name: str, limits: Limits, **values: object) -> dict[str, object]:
    """Return the settings of the loop for a stage before the transformer."""
    folder, run = settings.folder / name, settings.run
    return {
        "output_dir": str(folder),
        "export_dir": str(folder / "export"),
        "seed": run.seed,
        "accumulation": run.accumulation,
        "sheet_every": 0,
        "checkpoint_every": 0,
        "checkpoint_minutes": run.checkpoint_minutes,
        "log_every": run.log_every * 10,
        **limits.left(),
        **values,
    }


def trained_vae(settings: OwnDataSettings, base: BaseModel, accelerator: Accelerator, limits: Limits) -> Path:
    """Train the VAE, or only its decoder, and return the folder that holds it."""
    export = settings.folder / "vae" / "export"
    if not export.is_dir():
        vae = settings.vae
        values = {
            "steps": vae.steps,
            "batch_size": vae.batch,
            "lr": vae.lr,
            "warmup": min(100, vae.steps // 10),
            "start": str(base.part("vae")),
            "new": vae.train == "new",
            "size": max(stage.resolution for stage in settings.stages),
            "crop": vae.crop,
            "hidden_size": vae.hidden_size,
        }
        pictures = pictures_of(settings, 100_000)
        if vae.source and accelerator.is_main_process:
            note, licences = vae_note(settings), Counter(each.facts.licence for each in pictures)
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_json(note, {"count": len(pictures), "licences": dict(licences.most_common())})
        own = OwnVAESettings(**loop_settings(settings, "vae", limits, **values))
        logger.info("training the VAE (%s) on %d pictures, %d steps", vae.train, len(pictures), vae.steps)
        limits.finish(Run(OwnVAETask(own, pictures, accelerator.device), own, accelerator))
    return export


def grown_text(settings: OwnDataSettings, base: BaseModel, accelerator: Accelerator, limits: Limits) -> Path:
    """Teach the text encoder the words that it does not know, and return the folder that holds it."""
    folder = settings.folder / "text"
    export, start = folder / "export", folder / "start"
    if export.is_dir():
        return export
    captions = sorted({text for each in all_pictures(settings, tars=64) for text in each.facts.captions if text})
    tokenizer = base.load_tokenizer()
    words = unknown_words(tokenizer, captions) if settings.text.grow else {}
    target = start if words else export

    def work() -> bool:
        extend(base.part("tokenizer"), base.part("text_encoder"), sorted(words), target)
        return True

    main_process_does(accelerator, folder, work)
    if words:
        steps = settings.text.steps
        logger.info("teaching the text encoder %d words, %d steps: %s", len(words), steps, report(words))
        known = base.config("text_encoder")["vocab_size"]
        values = {"steps": steps, "batch_size": 32, "lr": 3e-3, "warmup": min(50, steps // 10), "ema_decay": 0.99}
        values |= {"folder": str(start), "known": known}
        own = WordSettings(**loop_settings(settings, "text", limits, **values))
        limits.finish(Run(WordTask(own, captions, accelerator.device), own, accelerator))
    return export


def encodes_online(settings: OwnDataSettings, base: BaseModel) -> bool:
    """Return whether captions are encoded in each step.

    Raises:
        ValueError: They are read from the disk, but change in each step; or a large text encoder is to be trained.
    """
    mode = settings.text.mode
    if settings.text.train and not is_small(base):
        raise ValueError(f"text.train: the text encoder of {base.name!r} is too large; nearest: text.train=False.")
    online = mode == "online" or (mode == "auto" and is_small(base))
    if not online and CaptionChoices.of(settings.data):
        raise ValueError(
            f"data.shuffle_caption and its like change captions in each step, but text.mode={mode!r} reads them from "
            "the disk; nearest: text.mode='online'."
        )
    return online


def captions_of(
    settings: OwnDataSettings, base: BaseModel, stages: Sequence[Encoded], accelerator: Accelerator
) -> list[OnlineText] | list[CachedText]:
    """Return what reads the captions of each stage; encodes them where they are read from the disk."""
    different = {encoded.version: encoded for encoded in stages}
    if accelerator.is_main_process:
        for encoded in different.values():
            say_unknown(base, encoded, settings.run.sheet, settings.text.tokens)
    if encodes_online(settings, base):
        return [OnlineText(base, settings.text.tokens, accelerator.device)] * len(stages)

    def work() -> list[str]:
        options = (settings.run.sheet, settings.text.tokens, accelerator.device)
        return [str(cache_text(base, encoded, *options)) for encoded in different.values()]

    folders = main_process_does(accelerator, settings.folder, work)
    made = {version: CachedText(Path(folder)) for version, folder in zip(different, folders, strict=True)}
    return [made[encoded.version] for encoded in stages]


def say_unknown(base: BaseModel, encoded: Encoded, prompts: Sequence[str], tokens: int) -> None:
    """Log which words the text encoder does not know, and which captions it cuts after so many tokens."""
    tokenizer = base.load_tokenizer()
    pairs = [(caption, "") for caption in prompts]
    for number in range(0, len(encoded.index), max(1, len(encoded.index) // WORDS_SHOWN)):
        line = encoded.caption_lines(number)
        pairs += [(caption, line["name"]) for caption in line["captions"]]
    say_what_is_lost(tokenizer, pairs, tokens)
