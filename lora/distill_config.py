"""Settings of a distillation: from a teacher that needs many guided steps to a student that needs few forwards."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ptdit_diffusers.training.settings import at_least, one_of

from .config import FREE, PRESETS, SYNONYMS, LoRASettings, TrainingSettings, check_warmup, setting

STAGES = ("paths", "segments", "tdm")
OF_TRAINERS = {name: ours for name, ours in SYNONYMS.items() if ours in TrainingSettings.__dataclass_fields__}


@dataclass(kw_only=True)
class DistillSettings(TrainingSettings):
    """Everything that decides what a distillation does; saved beside the student."""

    program: ClassVar[str] = "distill"
    presets_folder: ClassVar[Path] = PRESETS / "distill"
    synonyms: ClassVar[dict[str, str]] = {
        name: ours for name, ours in OF_TRAINERS.items() if name not in ("steps", "guidance")
    } | {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    needed: ClassVar[tuple[str, ...]] = ("output_dir", "prompts")
    free: ClassVar[list[str]] = [*FREE, "stage", "prompts", "paths_dir", "path_batch"]

    # the teacher's paths
    prompts: str = setting(
        "", "text file of captions, one per line; path i has caption i, and begins again at the end"
    )
    stage: str = setting(
        "segments", f"last stage to do: {', '.join(STAGES)}; those before it are done where they lack"
    )
    steps: int = setting(4, "forwards of the student; each replaces one segment of the teacher's path")
    guidance: float = setting(4.0, "of the teacher; the student has it built in and runs with 1")
    paths: int = setting(10000, "paths of the teacher, from noise to latents")
    paths_dir: str = setting("", "folder of the paths, which several students may share (default: OUTPUT_DIR/paths)")
    teacher_steps: int = setting(32, "guided steps of a path, a multiple of `points`")
    points: int = setting(8, "segments of a path whose ends are stored, a multiple of `steps`")
    path_batch: int = setting(64, "paths at a time")
    held_out: int = setting(200, "first paths that are not trained on; the log has the student's error on them")
    # the student
    rank: int = setting(64, "rank of the two matrices; 0 = all weights are trained, the student is a model folder")
    targets: str = setting("all-linear", TrainingSettings.__dataclass_fields__["targets"].metadata["help"])
    inner: float = setting(0.0, "share of samples inside a segment, on the line between its ends; 0..1. Above 0 the "
                                "student also does with more steps")  # fmt: skip
    own_states: float = setting(0.0, "share of the batches that begin where the student's own steps lead, and whose "
                                     "targets the teacher makes from there; 0..1")  # fmt: skip
    start: str = setting("", "folder `lora` of a student to go on from (default: from the teacher)")
    fake_lr: float = setting(5.0, "learning rate of the fake score of stage tdm, as a factor of `lr`")
    fake_first: int = setting(0, "steps of stage tdm in which the fake score learns alone")
    keep_first: int = setting(
        0, "in stage tdm, so many first steps of the student keep learning from the teacher's paths"
    )
    schedule: str = setting("linear", TrainingSettings.__dataclass_fields__["schedule"].metadata["help"])
    ema: float = setting(0.998, TrainingSettings.__dataclass_fields__["ema"].metadata["help"])

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        super().__post_init__()
        one_of("stage", self.stage, STAGES)
        for name in ("steps", "paths", "path_batch", "held_out"):
            at_least(name, getattr(self, name), 1)
        for name in ("fake_first", "keep_first"):
            at_least(name, getattr(self, name), 0)
        at_least("rank", self.rank, 0)
        at_least("guidance", self.guidance, 1)
        self.check_shares(inner=1, own_states=1)
        check_multiple("points", self.points, "steps", self.steps)
        check_multiple("teacher_steps", self.teacher_steps, "points", self.points)
        check_warmup(self.warmup, self.max_steps)
        if self.held_out >= self.paths:
            raise ValueError(f"held_out={self.held_out} leaves none of paths={self.paths}; nearest: {self.paths - 1}.")
        if self.stage == "tdm" and self.rank == 0:
            raise ValueError("rank=0 has no adapter, which stage tdm needs; nearest: rank=64.")
        of_stages = {"own_states": "segments", "fake_first": "tdm", "keep_first": "tdm"}
        for name, stage in of_stages.items() if self.stage != "paths" else ():
            if getattr(self, name) and self.stage != stage:
                raise ValueError(f"{name}={getattr(self, name)} is of stage {stage}, not {self.stage}; leave it out.")
        if self.keep_first >= self.steps:
            raise ValueError(
                f"keep_first={self.keep_first} leaves none of steps={self.steps} to stage tdm; nearest: "
                f"{self.steps - 1}."
            )
        if self.own_states and self.rank == 0:
            raise ValueError(f"own_states={self.own_states} needs the teacher in the same weights; nearest: rank=64.")
        if self.own_states and self.steps == 1:
            raise ValueError(f"own_states={self.own_states} is for several steps; nearest: steps=2.")
        if self.start and self.rank == 0:
            raise ValueError(f"start={self.start!r} is an adapter, which rank=0 does not train; leave it out.")
        if self.fake_lr <= 0:
            raise ValueError(f"fake_lr={self.fake_lr} must be above 0, for example 5.")
        if self.rank == 0 and self.base_weights != "none":
            raise ValueError(f"rank=0 trains the base weights; base_weights={self.base_weights!r} forbids that; "
                             "nearest: 'none'.")  # fmt: skip

    @property
    def paths_folder(self) -> Path:
        """Folder of the teacher's paths."""
        return Path(self.paths_dir) if self.paths_dir else Path(self.output_dir) / "paths"

    def adapter(self) -> LoRASettings:
        """Return the settings of the adapter."""
        return LoRASettings(
            output_dir=self.output_dir,
            rank=self.rank,
            targets=self.targets,
            base_weights=self.base_weights,
            start=self.start,
            resume=self.resume,
            seed=self.seed,
        )


def check_multiple(name: str, value: int, of: str, factor: int) -> None:
    """Raise ValueError unless a setting is a positive multiple of another."""
    if value < factor or value % factor:
        low = max(1, value // factor) * factor
        nearest = low if value < low else min(low, low + factor, key=lambda each: abs(each - value))
        raise ValueError(f"{name}={value} is not a multiple of {of}={factor}; nearest: {nearest}.")
