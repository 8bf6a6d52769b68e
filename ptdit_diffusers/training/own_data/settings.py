"""Settings of `ptdit train`: a YAML file with the sections data, stages, run and others, each a checked dataclass."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.captions import CaptionChoices, check_ending
from ptdit_diffusers.training.data.media import EXTRACTIONS, READ
from ptdit_diffusers.training.settings import LoopSettings, at_least, build, one_of, parse_yaml, read_yaml
from ptdit_diffusers.training.times import Times
from ptdit_diffusers.training.trackers import TRACKERS

TRAINED = {  # setting `train` -> regular expression for the names of the weights that are trained
    "all": r".*",
    "attention": r".*attn\d\..*",
    "lora": r".*attn\d\.(to_q|to_k|to_v|to_out\.0)",  # layers that get one
}
NEW = "new"  # `start` of new weights


@dataclass(kw_only=True)
class DataSettings:
    """What is trained on."""

    source: str  # folder, metadata.jsonl, metadata.csv, or tar shards: a file, a folder, or {000..123}.tar
    encoded: str = ""  # folder of the encoded shards; "" = output/encoded. Runs may share one
    default_caption: str = ""  # caption of files that have none
    trigger: str = ""  # word before every caption, or in place of [trigger] in it
    caption_column: str = ""  # of a table; "" = text, caption, prompt or description
    licence_column: str = ""  # of a table or .json file: every file must have one, and the model's card counts them
    group_column: str = ""  # of a table or .json file: samples of one name are held out for validation together
    caption_extension: str = ".txt"  # ending of files of captions
    shuffle_caption: bool = False  # tags in another order in each sample; this and the next five need text online
    keep_tokens: int = 0  # so many tags at the beginning stay
    keep_tokens_separator: str = ""  # for example "|||": what stands before it stays, and after a second one
    caption_separator: str = ","  # between tags
    caption_tag_dropout_rate: float = 0.0  # share of the tags that are left out; 0..1
    enable_wildcard: bool = False  # one line of a caption, and one of {red|blue}
    outside_files: bool = False  # take also files that a table or link names outside of its folder
    validation: float = 0.01  # share of the samples (below 1) or their number, which training never sees
    flip: bool = False  # train on mirrored copies, too
    random_crop: bool = False  # cut off what does not fit at random places instead of evenly
    image_variations: int = 4  # random crops of a file that are encoded
    alpha_mask: bool = False  # transparency is a mask: what is transparent is not trained on
    num_frames: int = 1  # frames taken from a clip, 4n + 1; pictures always have one
    fps: float = 0.0  # frames a second that are taken of a clip, which must have as many; 0 = all
    frame_extraction: str = "head"  # of a clip: head = its first num_frames, chunk = all pieces of so many
    num_views: int = 0  # pictures taken from each folder of views, NAME.views; 0 = none are there
    caption_dropout: float = 0.1  # share of samples trained without their caption, for guidance
    max_skips: float = 0.01  # share of the files that may be unreadable

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        at_least("data.validation", self.validation, 0)
        CaptionChoices.of(self)
        check_ending("data.caption_extension", self.caption_extension, READ)
        for name in ("caption_dropout", "max_skips"):
            at_least(f"data.{name}", value := getattr(self, name), 0)
            if value > 1:
                raise ValueError(f"data.{name}={value} must be at most 1; nearest: 1.")
        at_least("data.fps", self.fps, 0)
        at_least("data.image_variations", self.image_variations, 1)
        one_of("data.frame_extraction", self.frame_extraction, EXTRACTIONS)
        for_clips = {"fps": f"{self.fps:g}"} if self.fps else {}
        for_clips |= {"frame_extraction": repr(self.frame_extraction)} if self.all_pieces else {}
        for name, value in for_clips.items() if self.num_frames == 1 else ():
            raise ValueError(f"data.{name}={value} is for clips, but data.num_frames=1; nearest: num_frames=17.")
        if self.num_views and self.num_views < 2:
            raise ValueError(f"data.num_views={self.num_views} must be 0 or at least 2; nearest: 2.")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            low = max(1, (self.num_frames - 1) // 4 * 4 + 1)
            raise ValueError(f"data.num_frames={self.num_frames} is not of the form 4n + 1; nearest: {low}.")

    @property
    def all_pieces(self) -> bool:
        """Whether every piece of a clip is trained on."""
        return self.frame_extraction == "chunk"

    @property
    def crops(self) -> int:
        """Random ones that are encoded of each file; 0 = one, cut evenly."""
        return self.image_variations if self.random_crop else 0

    @property
    def copies(self) -> int:
        """Encoded of each file: crops, and mirrored ones."""
        return max(1, self.crops) * (1 + self.flip)

    @property
    def latent_frames(self) -> int:
        """Of the longest samples."""
        return max(1 + (self.num_frames - 1) // 4, self.num_views)


@dataclass(kw_only=True)
class TextSettings:
    """How captions are read."""

    mode: str = "auto"  # cached (embeddings on the disk), online (encoded in each step), auto (online where small)
    grow: bool = False  # teach the small text encoder the words of the captions that it does not know
    steps: int = 1000  # of that
    tokens: int = 200  # longest caption
    train: bool = False  # train a small text encoder together with the transformer, with train: all

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("text.mode", self.mode, ("auto", "cached", "online"))
        at_least("text.steps", self.steps, 1)
        at_least("text.tokens", self.tokens, 1)


@dataclass(kw_only=True)
class VAESettings:
    """What is done with the VAE before the transformer is trained."""

    train: str = "no"  # no, decoder (its encoder stays, so the transformer may go on), new (with start: new)
    steps: int = 3000
    batch: int = 8
    crop: int = 64  # side of the crops that are trained on, pixels
    lr: float = 2e-4
    hidden_size: int = 0  # channels of a new one at full resolution; 0 = as the VAE of the base
    source: str = ""  # pictures that it is trained on, as data.source; "" = those of data

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("vae.train", self.train, ("no", "decoder", "new"))
        for name in ("steps", "batch"):
            at_least(f"vae.{name}", getattr(self, name), 1)
        at_least("vae.hidden_size", self.hidden_size, 0)
        if self.hidden_size and self.train != "new":
            raise ValueError(f"vae.hidden_size={self.hidden_size} is for vae.train='new', not {self.train!r}.")
        if self.source and self.train == "no":
            raise ValueError(f"vae.source={self.source!r} is for vae.train='decoder' or 'new', not 'no'.")
        if self.crop % 16 or self.crop < 16:
            raise ValueError(
                f"vae.crop={self.crop} is not a multiple of 16; nearest: {max(16, self.crop // 16 * 16)}."
            )


@dataclass(kw_only=True)
class SizeSettings:
    """Sizes of a new transformer."""

    layers: int = 6
    heads: int = 3
    head_width: int = 64
    num_windows: int = 16  # windows per frame at any resolution; a square number
    base_tokens: int = 28  # tokens per frame at which the time shift is 1

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        for name in ("layers", "heads", "head_width", "num_windows", "base_tokens"):
            at_least(f"size.{name}", getattr(self, name), 1)
        if (side := round(self.num_windows**0.5)) ** 2 != self.num_windows:
            raise ValueError(f"size.num_windows={self.num_windows} is not a square number; nearest: {side**2}.")
        if self.heads * self.head_width % 16:
            raise ValueError(f"size: heads * head_width = {self.heads * self.head_width} must be a multiple of 16.")


@dataclass(kw_only=True)
class StageSettings:
    """A part of the training at one resolution."""

    resolution: int  # pixels: pictures get about resolution^2 of them
    steps: int
    batch: int  # samples per step, of all processes together
    lr: float
    warmup: int = 0  # steps from 0 to lr
    decay: str = "constant"  # or cosine, linear: towards 0 at the last step of the stage
    buckets: float = 2.0  # longest side over shortest side at most; 1 = square only
    where: str = ""  # for example "quality >= 5.5"
    data: str = ""  # a source of its own; "" = data.source

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        for name in ("resolution", "steps", "batch", "buckets"):
            at_least(f"stages.{name}", getattr(self, name), 1)
        at_least("stages.warmup", self.warmup, 0)
        if self.lr <= 0:
            raise ValueError(f"stages.lr={self.lr} must be above 0, for example 0.0001.")
        if self.warmup > self.steps:
            raise ValueError(f"stages.warmup={self.warmup} is longer than steps={self.steps}; nearest: {self.steps}.")
        one_of("stages.decay", self.decay, ("constant", "cosine", "linear"))


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimizer."""

    name: str = "adamw"  # or adamw8bit (needs torchao)
    weights: str = "fp32"  # or bf16-stochastic: half the memory, rounded at random (needs torchao, one process)
    muon: str = ""  # regular expression: matrices of these names are trained by Muon
    weight_decay: float = 0.01  # on matrices only
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("optimizer.name", self.name, ("adamw", "adamw8bit"))
        one_of("optimizer.weights", self.weights, ("fp32", "bf16-stochastic"))
        if self.muon and self.half:
            raise ValueError("optimizer.muon does not round at random; nearest: weights: fp32.")

    @property
    def half(self) -> bool:
        """Whether the weights are bf16."""
        return self.weights == "bf16-stochastic"

    @property
    def from_torchao(self) -> bool:
        """Whether the optimizer is torchao's."""
        return self.half or self.name == "adamw8bit"


@dataclass(kw_only=True)
class ParallelSettings:
    """Memory and speed."""

    shard: int = 1  # processes that share the weights (FSDP2); several such groups have copies (HSDP)
    context: int = 1  # processes that share the tokens of each sample, which is too large for one
    recompute: bool = False  # recompute blocks in the backward pass: slower, much less memory
    compile: bool = False  # torch.compile the blocks

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        at_least("parallel.shard", self.shard, 1)
        at_least("parallel.context", self.context, 1)


@dataclass(kw_only=True)
class RunSettings:
    """Output, records and limits. Intervals are steps; 0 turns one off."""

    output: str  # folder of the run: checkpoints, log, sheets, model
    seed: int = 0
    precision: str = "auto"  # fp32, bf16 or auto: bf16 where the GPU computes in it
    accumulation: int = 1  # forwards per step and process, where a batch does not fit into memory
    workers: int = 0  # processes that read the shards
    max_minutes: float = 0.0  # save and stop after this long in one call
    stop_after: int = 0  # save and stop after so many steps of one call
    log_every: int = 10
    peak_tflops: float = 0.0  # of one device, 10^12 operations per second, for `mfu`; 0 = looked up for known GPUs
    checkpoint_every: int = 500
    checkpoint_minutes: float = 10.0
    keep: int = 2  # checkpoints kept
    async_: bool = False  # written `async`: training goes on while a checkpoint is written
    export_every: int = 0  # also write the model so far, to exports/step-NUMBER
    sheet: tuple[str, ...] = ()  # prompts of the pictures; picture i has seed i
    sheet_kind: str = "pictures"  # or clips of data.num_frames, or views of data.num_views, side by side
    sheet_every: int = 500
    steps: int = 30  # denoising steps of those pictures
    guidance: float = 4.0  # of those pictures
    ema: tuple[float, ...] = (0.05, 0.10)  # relative widths of the running averages; the first is what is saved
    snapshots: int = 20  # of the averages in a run, for `ptdit average`
    report_to: str = "none"

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("run.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("run.sheet_kind", self.sheet_kind, ("pictures", "clips", "views"))
        one_of("run.report_to", self.report_to, ("none", *TRACKERS))
        for name in ("accumulation", "log_every", "keep", "steps"):
            at_least(f"run.{name}", getattr(self, name), 1)
        least = "seed workers max_minutes stop_after checkpoint_every checkpoint_minutes".split()
        for name in [*least, "export_every", "sheet_every", "snapshots", "peak_tflops"]:
            at_least(f"run.{name}", getattr(self, name), 0)
        for width in self.ema:
            if not 0 < width < 0.28:
                raise ValueError(f"run.ema={width} must be above 0 and below 0.28, for example 0.1.")


@dataclass(kw_only=True)
class OwnDataSettings:
    """The whole file."""

    data: DataSettings
    start: str = "shapes-128"  # model folder, Hub id, short name of an embedded model, or "new"
    base: str = "shapes-128"  # with start: new, the model whose VAE and text encoder are used
    train: str = "all"  # all, attention, or lora
    rank: int = 16  # of the LoRA
    stages: tuple[StageSettings, ...]
    size: SizeSettings = field(default_factory=SizeSettings)
    times: Times = field(default_factory=Times)
    text: TextSettings = field(default_factory=TextSettings)
    vae: VAESettings = field(default_factory=VAESettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    run: RunSettings

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("train", self.train, tuple(TRAINED))
        at_least("rank", self.rank, 1)
        if not self.stages:
            raise ValueError("stages is empty; give at least one with resolution, steps, batch and lr.")
        if self.start == NEW and self.train != "all":
            raise ValueError(f"train={self.train!r} needs a trained model; with start: new use train: all.")
        if self.vae.train == "new" and self.start != NEW:
            raise ValueError(
                "vae.train='new' gives other latents than those that the transformer knows; nearest: 'decoder', or "
                "start: new."
            )
        if self.optimizer.half and (self.run.precision == "fp32" or self.train == "lora"):
            name = "train: attention" if self.train == "lora" else "run.precision: bf16"
            raise ValueError(f"optimizer.weights='bf16-stochastic' trains bf16 weights; nearest: {name}.")
        if self.optimizer.name == "adamw8bit" and self.parallel.shard > 1:
            raise ValueError(
                "optimizer.name='adamw8bit' has no checkpoints in parts (parallel.shard); nearest: adamw."
            )
        if self.run.sheet_kind == "views" and not self.data.num_views:
            raise ValueError("run.sheet_kind='views' needs data.num_views; nearest: 'pictures'.")
        if self.text.train and self.train != "all":
            raise ValueError(f"text.train is for train: all, not {self.train!r}; nearest: text.train=False.")
        if self.text.train and (self.parallel.shard > 1 or self.parallel.context > 1 or self.optimizer.half):
            raise ValueError(
                "text.train was not made for parallel.shard, parallel.context or optimizer.weights='bf16-stochastic'; "
                "nearest: several processes without them (DDP)."
            )
        if self.text.train and self.text.mode == "cached":
            raise ValueError("text.train changes the embeddings, which mode='cached' forbids; nearest: 'auto'.")
        if self.text.grow and self.text.mode == "cached":
            raise ValueError("text.grow changes the text encoder, which mode='cached' forbids; nearest: 'auto'.")

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.run.seed

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.run.output)

    @property
    def encoded(self) -> Path:
        """Folder of the encoded shards."""
        return Path(self.data.encoded) if self.data.encoded else self.folder / "encoded"

    @property
    def components(self) -> str:
        """Model whose VAE and text encoder are used."""
        return self.base if self.start == NEW else self.start

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Return the stage of a 0-based step, and the step within the stage; the last stage has no end."""
        for number, stage in enumerate(self.stages[:-1]):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, step

    def loop_settings(self) -> LoopSettings:
        """Return what the training loop asks for."""
        run = self.run
        names = "seed accumulation workers max_minutes stop_after log_every checkpoint_every checkpoint_minutes keep"
        return LoopSettings(
            **{name: getattr(run, name) for name in [*names.split(), "export_every"]},
            save_in_background=run.async_,
            output_dir=run.output,
            export_dir=str(self.folder / "model"),
            steps=self.total_steps,
            batch_size=1,  # the stages have their own
            warmup=0,
            clip=self.optimizer.clip,
            shard=self.parallel.shard,
            context_parallel=self.parallel.context,
            sheet_every=run.sheet_every,
        )


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> OwnDataSettings:
    """Return the settings of a YAML file.

    Args:
        path: Of the file.
        overrides: Of the form "run.output=runs/cats", before the values of the file.

    Raises:
        ValueError: It is no such file, or a key or value is wrong; names it with the nearest.
        OSError: It cannot be read.
    """
    values = read_yaml(path)
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE, for example --set run.output=runs/cats.")
        *parents, last = name.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {item!r}: {parent} is no section of {path}.")
        target[last] = parse_yaml(value)
    return build(OwnDataSettings, values, str(path))


def by_source(settings: OwnDataSettings) -> dict[str, OwnDataSettings]:
    """Return the settings of each data source: it is the only one, with the stages that are trained on it."""
    found: dict[str, list[StageSettings]] = {}
    for stage in settings.stages:
        found.setdefault(stage.data or settings.data.source, []).append(stage)
    return {
        source: dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, source=source), stages=tuple(stages)
        )
        for source, stages in found.items()
    }


def for_inspection(
    source: str | None, config: str | None, start: str | None, resolution: int | None
) -> OwnDataSettings:
    """Return the settings of a file, or ordinary ones, with another source, start or resolution.

    Raises:
        ValueError: There is neither a source nor a file, or a value is wrong.
        OSError: The file cannot be read.
    """
    if config:
        given = {"data.source": source, "start": start}
        settings = read_settings(config, [f"{name}={value}" for name, value in given.items() if value])
    elif source:
        stage = StageSettings(resolution=resolution or 16, steps=1000, batch=16, lr=1e-4)
        data, run = DataSettings(source=source), RunSettings(output=str(Path(source).parent / "run"))
        settings = OwnDataSettings(data=data, start=start or "shapes-128", stages=(stage,), run=run)
        resolution = resolution or BaseModel(settings.start).own_resolution
    else:
        raise ValueError("give DATA or --config.")
    if resolution:
        last = dataclasses.replace(settings.stages[-1], resolution=resolution)
        settings = dataclasses.replace(settings, stages=(*settings.stages[:-1], last))
    return settings
