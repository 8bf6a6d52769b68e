"""Settings of a run: one flat dataclass; every setting is a key of a YAML file and an option of the command."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ptdit_diffusers.training.data.captions import CaptionChoices, check_ending
from ptdit_diffusers.training.data.media import EXTRACTIONS, READ
from ptdit_diffusers.training.optimizers import OPTIMIZERS
from ptdit_diffusers.training.schedules import SCHEDULES
from ptdit_diffusers.training.settings import LoopSettings, at_least, build, one_of
from ptdit_diffusers.training.times import KINDS, Times
from ptdit_diffusers.training.trackers import TRACKERS

from .prompts import WORDS, Prompt, parse_prompt

PRESETS = Path(__file__).parent / "configs"  # YAML files that are part of the package

TARGETS = {  # preset -> regular expression that the whole name of a Linear layer must match
    "attention": r".*attn\d\.(to_q|to_k|to_v|to_out\.0)",
    "attention+ff": r".*attn\d\.(to_q|to_k|to_v|to_out\.0)|.*\.ff\.net\.(0\.proj|2)",
    "all-linear": r".*",
}
INITS = ("default", "gaussian", "pissa", "olora")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SAVED = ("fp32", "bf16", "fp16")
BASES = ("none", "fp8", "int8", "nf4")
REPORTS = ("none", *TRACKERS)
SYNONYMS = {  # names that other trainers have -> ours
    "learning_rate": "lr",
    "unet_lr": "lr",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup",
    "warmup_steps": "warmup",
    "max_train_steps": "max_steps",
    "steps": "max_steps",
    "num_train_epochs": "epochs",
    "max_train_epochs": "epochs",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "mixed_precision": "precision",
    "dtype": "precision",
    "max_grad_norm": "clip",
    "adam_weight_decay": "weight_decay",
    "optimizer_type": "optimizer",
    "pretrained_model_name_or_path": "base",
    "model": "base",
    "train_data_dir": "data",
    "instance_data_dir": "data",
    "dataset": "data",
    "dataset_name": "data",
    "image_dir": "data",
    "folder_path": "data",
    "reg_data_dir": "datasets",
    "class_data_dir": "datasets",
    "dataset_config": "datasets",
    "caption_ext": "caption_extension",
    "caption_file_extension": "caption_extension",
    "shuffle_tags": "shuffle_caption",
    "shuffle_tokens": "shuffle_caption",
    "wildcards": "enable_wildcard",
    "caption_prefix": "trigger",
    "weighting_scheme": "timestep_sampling",
    "target_fps": "fps",
    "network_weights": "start",
    "network_reg_dims": "rank_pattern",
    "block_dims": "rank_pattern",
    "network_reg_lrs": "lr_pattern",
    "block_lr_weight": "lr_pattern",
    "loraplus_lr_ratio": "lr_pattern",
    "text_encoder_lr": "lr_pattern",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "save_dtype": "save_precision",
    "sample_prompts": "validation_prompts",
    "sample_every_n_steps": "validation_every",
    "masked_loss": "alpha_mask",
    "masked_training": "alpha_mask",
    "minimum_image_size": "skip_image_resolution",
    "crop_jitter": "random_crop",
    "subsets": "datasets",
    "flip_aug": "flip",
    "output": "output_dir",
    "instance_prompt": "default_caption",
    "trigger_word": "trigger",
    "class_prompt": "prior_prompts",
    "network_dim": "rank",
    "lora_rank": "rank",
    "network_alpha": "alpha",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "network_dropout": "dropout",
    "target_modules": "targets",
    "lora_layers": "targets",
    "use_dora": "dora",
    "random_flip": "flip",
    "num_repeats": "repeats",
    "caption_dropout_rate": "caption_dropout",
    "size": "resolution",
    "width": "resolution",
    "height": "resolution",
    "frames": "num_frames",
    "checkpointing_steps": "checkpoint_every",
    "save_every_n_steps": "export_every",
    "save_every": "export_every",
    "checkpoints_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log_every",
    "validation_prompt": "validation_prompts",
    "validation_steps_every": "validation_every",
    "dataloader_num_workers": "workers",
    "use_ema": "ema",
    "hub_model_id": "push_to_hub",
}
PRODIGY_LEAST = 0.1  # learning rate: a factor of the rate that prodigy finds
OF_DATA_SET = (  # settings that an entry of `datasets` may have
    "data resolution num_frames default_caption caption_column trigger outside_files bucket_step max_aspect flip "
    "repeats caption_dropout is_reg prior_weight caption_extension shuffle_caption keep_tokens keep_tokens_separator "
    "caption_separator caption_tag_dropout_rate enable_wildcard text_variations skip_image_resolution random_crop "
    "image_variations alpha_mask fps frame_extraction"
).split()
# May change when a run is resumed; everything else decides what comes out.
FREE = (
    "output_dir base max_steps stop_after max_minutes workers log_every checkpoint_every keep validation_every "
    "validation_prompts validation_seed report_to push_to_hub resume accept_changes compile"
).split()


def setting(default: Any, help: str) -> Any:
    """Make a field with the text that `--help` shows for it."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class TrainingSettings:
    """What every run that trains an adapter for a base model has, whatever it learns.

    Attributes:
        program: Name of the command.
        presets_folder: YAML files that are part of the package.
        synonyms: Names that other trainers have -> ours.
        free: Settings that may change when a run is resumed.
        needed: Settings that have no default.
    """

    program: ClassVar[str] = "lora"
    presets_folder: ClassVar[Path] = PRESETS
    synonyms: ClassVar[dict[str, str]] = {}
    free: ClassVar[list[str]] = FREE
    needed: ClassVar[tuple[str, ...]] = ("output_dir",)

    # model
    base: str = setting("shapes-128", "base model: folder, Hub id or short name of an embedded model")
    output_dir: str = setting("", "folder of the run: checkpoints, log, pictures and the finished LoRA")
    resolution: int = setting(0, "pixels: pictures get about resolution^2 of them; 0 = the model's own size")
    num_frames: int = setting(1, "frames taken from a video, 4n + 1; pictures always have one")
    # adapter
    rank: int = setting(16, "rank of the two matrices")
    targets: str = setting("attention", f"layers: {', '.join(TARGETS)}, names with commas, or a regular expression")
    base_weights: str = setting("none", f"how the frozen weights are kept: {', '.join(BASES)} (none = in `precision`)")
    # optimization
    max_steps: int = setting(1000, "optimizer steps")
    stop_after: int = setting(0, "save and stop after this many steps of this call; 0 = off")
    max_minutes: float = setting(0.0, "save and stop after this many minutes of this call; 0 = off")
    batch_size: int = setting(1, "samples per process and forward")
    accumulation: int = setting(1, "forwards per optimizer step")
    precision: str = setting("auto", "fp32, bf16 or fp16; auto = bf16 where the GPU computes in it, else fp32")
    optimizer: str = setting("adamw", f"one of {', '.join(OPTIMIZERS)}, or a class such as torch.optim.Adafactor")
    optimizer_args: dict[str, Any] = setting({}, "further arguments of it: betas=[0.9,0.99]")
    lr: float = setting(1e-4, "peak learning rate (1 for prodigy)")
    schedule: str = setting("constant_with_warmup", f"learning rate: {', '.join(SCHEDULES)}")
    warmup: int = setting(0, "steps from 0 to the peak learning rate")
    weight_decay: float = setting(0.01, "of the optimizer")
    clip: float = setting(1.0, "largest gradient norm")
    ema: float = setting(0.0, "decay of a running average of the weights, which is what is saved then; 0 = off")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: slower, much less memory")
    compile: bool = setting(False, "torch.compile the blocks")
    seed: int = setting(0, "of everything random")
    workers: int = setting(0, "processes that read the cache; 0 = the training process")
    # records
    resume: bool = setting(False, "go on from the newest checkpoint in output_dir")
    accept_changes: bool = setting(False, "resume although captions, files or base weights are not what they were")
    log_every: int = setting(10, "steps")
    checkpoint_every: int = setting(250, "steps; 0 = only at the end")
    keep: int = setting(2, "checkpoints kept")
    validation_every: int = setting(0, "steps between validation pictures; 0 = off")
    validation_prompts: tuple[str, ...] = setting(
        (), f"prompts of pictures at 0, 25, 50 and 100 %% of the steps; with options in the text: {WORDS}"
    )
    validation_seed: int = setting(0, "picture i has the seed validation_seed + i")
    report_to: str = setting(
        "none", f"also write the log and pictures for {', '.join(REPORTS[1:])}; none = files only"
    )
    push_to_hub: str = setting("", "OWNER/NAME of a Hub repository that gets the finished LoRA")

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        for name in ("max_steps", "batch_size", "accumulation", "log_every", "keep", "num_frames"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup", "weight_decay", "checkpoint_every", "validation_every", "seed", "validation_seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("resolution", "stop_after", "max_minutes", "workers"):
            at_least(name, getattr(self, name), 0)
        self.check_shares(ema=0.99999)
        for name in ("lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, for example 1.")
        _ = self.shown  # refuses options that are not right
        choices = {"precision": PRECISIONS, "base_weights": BASES}
        choices |= {} if "." in self.optimizer else {"optimizer": OPTIMIZERS}
        choices |= {"schedule": SCHEDULES, "report_to": REPORTS}
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        if self.optimizer == "prodigy" and self.lr < PRODIGY_LEAST:
            raise ValueError(
                f"lr={self.lr} is a factor of the learning rate that optimizer='prodigy' finds by itself; nearest: 1."
            )
        if self.optimizer == "schedule_free_adamw":
            why = "optimizer='schedule_free_adamw' averages the weights of a constant rate by itself"
            if not self.schedule.startswith("constant"):
                raise ValueError(f"schedule={self.schedule!r}: {why}; nearest: 'constant_with_warmup'.")
            if self.ema:
                raise ValueError(f"ema={self.ema}: {why}; nearest: 0.")
        if (self.num_frames - 1) % 4:
            low = (self.num_frames - 1) // 4 * 4 + 1
            raise ValueError(f"num_frames={self.num_frames} is not of the form 4n + 1; nearest: {low} or {low + 4}.")

    @property
    def shown(self) -> list[Prompt]:
        """The validation prompts with their options; picture i has the seed validation_seed + i unless it says one."""
        prompts = map(parse_prompt, self.validation_prompts)
        return [
            dataclasses.replace(prompt, seed=self.validation_seed + i if prompt.seed is None else prompt.seed)
            for i, prompt in enumerate(prompts)
        ]

    @property
    def shown_texts(self) -> list[str]:
        """All texts that validation pictures need, the empty one among them."""
        return ["", *(text for prompt in self.shown for text in (prompt.text, prompt.negative))]

    def check_shares(self, **most: float) -> None:
        """Raise ValueError unless these settings lie between 0 and their largest values."""
        for name, limit in most.items():
            at_least(name, value := getattr(self, name), 0)
            if value > limit:
                raise ValueError(f"{name}={value} must be at most {limit}; nearest: {limit}.")

    def loop_settings(self, steps: int) -> LoopSettings:
        """Return what the training loop asks for; `steps` depends on the data where `epochs` is set."""
        shared = "output_dir seed batch_size accumulation workers clip log_every checkpoint_every keep".split()
        return LoopSettings(
            **{name: getattr(self, name) for name in [*shared, "stop_after", "max_minutes"]},
            export_dir=self.output_dir,
            steps=steps,
            warmup=0,  # the schedule is the task's
            sheet_every=self.validation_every if self.validation_prompts else 0,
            checkpoint_minutes=0,
        )


@dataclass(kw_only=True)
class LoRASettings(TrainingSettings):
    """Everything that decides what a run does; saved beside the LoRA."""

    synonyms: ClassVar[dict[str, str]] = SYNONYMS
    needed: ClassVar[tuple[str, ...]] = ("output_dir", "data")
    free: ClassVar[list[str]] = [
        *FREE,
        *"data outside_files caption_column cache_dir rebuild_cache export_every save_precision".split(),
        *"validation_steps validation_guidance start".split(),
    ]

    # records
    save_precision: str = setting("fp32", f"number format of the files of a LoRA: {', '.join(SAVED)}")
    export_every: int = setting(0, "steps between LoRAs in OUTPUT_DIR/exports, to pick the best; 0 = only at the end")
    # data
    data: str = setting("", "folder, metadata.jsonl, metadata.csv, or hub:OWNER/DATASET")
    datasets: tuple[dict[str, Any], ...] = setting(
        (), "instead of data: several of them, each a mapping with `data` and the settings that differ for it, for "
            "example '{data: a, repeats: 2, resolution: 512}'"
    )  # fmt: skip
    is_reg: bool = setting(False, "of one of `datasets`: pictures to keep, whose loss has the weight prior_weight")
    validation_split: float = setting(0.0, "share (below 1) or number of the pictures that are not trained on; the "
                                           "log has the loss on them")  # fmt: skip
    cache_dir: str = setting("", "folder of the cached latents and embeddings (default: OUTPUT_DIR/cache)")
    rebuild_cache: bool = setting(False, "delete all that is cached in the folder of the cache, and encode it again")
    outside_files: bool = setting(False, "take also files that a table or link in `data` names outside of its folder")
    default_caption: str = setting("", "caption of files that have none; the log names their number")
    caption_column: str = setting(
        "", "column of the captions in a table; default: text, caption, prompt or description"
    )
    caption_extension: str = setting(".txt", "ending of the files of captions, for example .caption")
    shuffle_caption: bool = setting(False, "tags in other orders, while those that keep_tokens names stay")
    keep_tokens: int = setting(0, "so many tags at the beginning of a caption stay; the trigger does anyway")
    keep_tokens_separator: str = setting("", "for example |||: tags before it stay, and those after a second one")
    caption_separator: str = setting(",", "between tags")
    caption_tag_dropout_rate: float = setting(0.0, "share of the tags that are left out; 0..1")
    enable_wildcard: bool = setting(False, "take one line of each caption, and one of {red|blue}")
    text_variations: int = setting(8, "forms of a caption that are encoded, where anything is chosen in it")
    trigger: str = setting("", "word put before every caption, or in place of [trigger] in it")
    bucket_step: int = setting(0, "pixels: sides of buckets are multiples of this; 0 = one window of the model")
    max_aspect: float = setting(2.0, "longest side over shortest side of a bucket; 1 = square only")
    skip_image_resolution: int = setting(0, "files of this number squared pixels or fewer are skipped; 0 = none is")
    random_crop: bool = setting(False, "cut off what does not fit at random places instead of evenly")
    image_variations: int = setting(4, "random crops of a file that are encoded")
    alpha_mask: bool = setting(False, "transparency is a mask: what is transparent is not trained on")
    fps: float = setting(0.0, "frames a second that are taken of a video; 0 = all")
    frame_extraction: str = setting("head", "of a video: head = its first num_frames, chunk = all pieces of them")
    flip: bool = setting(False, "train on mirrored copies, too")
    repeats: int = setting(1, "how often a picture occurs in one epoch")
    caption_dropout: float = setting(0.1, "share of samples trained without their caption, for guidance; 0..1")
    prior_prompts: str = setting("", "text file, one prompt per line: the base model generates a picture of each, and "
                                     "the LoRA is trained to keep them")  # fmt: skip
    prior_weight: float = setting(1.0, "weight of the loss on those pictures")
    prior_repeats: int = setting(1, "how often one of those pictures occurs in one epoch")
    # adapter
    start: str = setting("", "LoRA (file or folder) that the training starts from; a resumed run does not read it")
    rank_pattern: dict[str, int] = setting(
        {}, "other ranks: REGEX=RANK, found in the names of layers; the last counts, 0 leaves layers out"
    )
    lr_pattern: dict[str, float] = setting(
        {}, "factors of the learning rate: REGEX=FACTOR, found in the names of layers or lora_A, lora_B"
    )
    alpha: float = setting(0.0, "strength: the product is scaled by alpha / rank; 0 = rank")
    dropout: float = setting(0.0, "share of inputs of an adapter that are dropped in training; 0..1")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    dora: bool = setting(False, "train the size of each output apart from its direction (DoRA)")
    init: str = setting("default", f"first values: {', '.join(INITS)}")
    train_text_encoder: bool = setting(False, "a LoRA on the text encoder, too, where it is small")
    proxy_mode: str = setting("mean", "proxies in training: mean, or random (v1 of the paper, as a regularizer)")
    # optimization
    lr_num_cycles: int = setting(1, "of schedule cosine_with_restarts")
    epochs: int = setting(0, "passes over the data instead of max_steps; 0 = off")
    context_parallel: int = setting(1, "processes that share each sample: for videos that do not fit on one GPU")
    timestep_sampling: str = setting("logit_normal", f"distribution of training times: {', '.join(KINDS)}")
    mode_scale: float = setting(1.29, "of timestep_sampling mode: above 0 more times in the middle")
    min_timestep: float = setting(0.0, "training times, after the shift, are scaled to this..max_timestep; 0..1000")
    max_timestep: float = setting(1000.0, "1000 is noise")
    time_mean: float = setting(0.0, "training times are sigmoids of a normal distribution: its mean")
    time_std: float = setting(1.0, "its standard deviation")
    validation_steps: int = setting(30, "denoising steps of validation pictures")
    validation_guidance: float = setting(4.0, "guidance of validation pictures")

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        super().__post_init__()
        for name in "rank repeats prior_repeats validation_steps max_aspect context_parallel lr_num_cycles".split():
            at_least(name, getattr(self, name), 1)
        for name in ("text_variations", "image_variations"):
            at_least(name, getattr(self, name), 1)
        for name in "alpha epochs bucket_step prior_weight export_every validation_split".split():
            at_least(name, getattr(self, name), 0)
        for name in ("skip_image_resolution", "fps"):
            at_least(name, getattr(self, name), 0)
        CaptionChoices.of(self)
        check_ending("caption_extension", self.caption_extension, READ)
        self.check_shares(caption_dropout=1, dropout=0.99)
        choices = {"save_precision": SAVED, "frame_extraction": EXTRACTIONS}
        choices |= {"init": INITS, "proxy_mode": ("mean", "random")}
        for name, allowed in choices.items():
            one_of(name, getattr(self, name), allowed)
        if not self.epochs:
            check_warmup(self.warmup, self.max_steps)
        Times.of(self)
        self.check_adapter()
        self.check_data()

    def check_data(self) -> None:
        """Raise ValueError where the data sets, or what is held out of them, are not possible."""
        split = self.validation_split
        if split > 1 and split != int(split):
            raise ValueError(
                f"validation_split={split:g} is neither a share below 1 nor a whole number; nearest: {round(split)}."
            )
        if self.data and self.datasets:
            raise ValueError(f"data={self.data!r} and datasets exclude each other; nearest: datasets alone.")
        if self.is_reg and not isinstance(self, OneDataSet):
            raise ValueError("is_reg is for an entry of `datasets`, not for all data; nearest: is_reg=False.")
        longest = max(each.num_frames for each in self.data_sets())
        if longest == 1 and (self.fps or self.frame_extraction != "head"):
            name = "fps" if self.fps else "frame_extraction"
            raise ValueError(f"{name}={getattr(self, name)} is for clips, but num_frames=1; nearest: num_frames=17.")

    def check_adapter(self) -> None:
        """Raise ValueError where the kind of the adapter, its start, or ranks and rates by name are not possible."""
        if self.init in ("pissa", "olora") and self.base_weights != "none":
            raise ValueError(
                f"init={self.init!r} changes the base weights; base_weights={self.base_weights!r} forbids that; "
                "nearest: init='default'."
            )
        if self.dora and self.base_weights == "fp8":
            raise ValueError("dora reads the base weights, which base_weights='fp8' forbids; nearest: 'int8'.")
        if self.start and self.init != "default":
            raise ValueError(f"init={self.init!r}: start={self.start!r} has the first values; nearest: 'default'.")
        for pattern, rank in self.rank_pattern.items():
            at_least(f"rank_pattern[{pattern!r}]", rank, 0)
        for pattern, factor in self.lr_pattern.items():
            at_least(f"lr_pattern[{pattern!r}]", factor, 0)
        if self.lr_pattern and self.optimizer == "prodigy":
            raise ValueError("lr_pattern: optimizer='prodigy' has one rate for all; nearest: 'adamw'.")
        if self.lr_num_cycles > 1 and self.schedule != "cosine_with_restarts":
            raise ValueError(
                f"lr_num_cycles={self.lr_num_cycles}: schedule={self.schedule!r} has no cycles; nearest: "
                "schedule='cosine_with_restarts'."
            )
        if self.init in ("pissa", "olora") and self.dora:
            raise ValueError(f"init={self.init!r} and dora exclude each other; nearest: init='default'.")
        if self.context_parallel > 1 and self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: with context_parallel={self.context_parallel} each process would drop other "
                "inputs of the same layers; nearest: dropout=0."
            )

    def data_sets(self) -> tuple["LoRASettings", ...]:
        """Return the settings of each data set: these, with what `datasets` says about it.

        Raises:
            ValueError: An entry of `datasets` is not right; names it with the nearest.
        """
        return tuple(self._of_data_set(number, entry) for number, entry in enumerate(self.datasets)) or (self,)

    def _of_data_set(self, number: int, entry: dict[str, Any]) -> "LoRASettings":
        where = f"datasets[{number}]"
        if not entry.get("data"):
            raise ValueError(f"{where}.data is missing: the folder or table of this data set.")
        fields = [field.name for field in dataclasses.fields(self)]
        for name in entry:
            if name in fields and name not in OF_DATA_SET:
                raise ValueError(f"{where}.{name} is the same for all data sets; set {name} outside of `datasets`.")
            if name not in OF_DATA_SET:
                near = SYNONYMS.get(name) or difflib.get_close_matches(str(name), OF_DATA_SET, n=1, cutoff=0)[0]
                raise ValueError(f"{where}.{name} is not a setting; nearest: {near}.")
        common = {name: getattr(self, name) for name in fields if name != "datasets"} | {"prior_prompts": ""}
        if entry.get("num_frames", self.num_frames) == 1:
            common |= {"fps": 0.0, "frame_extraction": "head"}  # those outside are for the clips of other entries
        try:
            return build(OneDataSet, common | entry, where)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error

    @property
    def trigger_words(self) -> str:
        """The trigger words of all data sets but those of pictures to keep, with commas between them."""
        return ", ".join(dict.fromkeys(each.trigger for each in self.data_sets() if each.trigger and not each.is_reg))

    @property
    def has_sheets(self) -> bool:
        """Whether there is something to show or to measure between the steps."""
        return bool(self.validation_prompts or self.validation_split)

    def loop_settings(self, steps: int) -> LoopSettings:
        own = {name: getattr(self, name) for name in ("context_parallel", "export_every")}
        own["sheet_every"] = self.validation_every if self.has_sheets else 0
        return dataclasses.replace(super().loop_settings(steps), **own)

    @property
    def cache_folder(self) -> Path:
        """Folder of the cached latents and embeddings."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir) / "cache"

    @property
    def scale_alpha(self) -> float:
        """Alpha with its default filled in."""
        return self.alpha or float(self.rank)


class OneDataSet(LoRASettings):
    """The settings of one entry of `datasets`."""


def check_warmup(warmup: int, steps: int) -> None:
    """Raise ValueError where the learning rate would never reach its peak."""
    if warmup > steps:
        raise ValueError(f"warmup={warmup} is longer than the {steps} steps of the run; nearest: {steps}.")
