"""A finished student: an adapter for diffusers and ComfyUI, or a model folder, with what it was distilled for."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ptdit_diffusers.core.few_steps import DISTILLED
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.core.folder_files import new_folder
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.base_model import BaseModel

from .distill_config import DistillSettings
from .export import MODEL_FILE, add_records, finished_folder, in_markdown, public_name, shown_settings, write_lora
from .paths import Paths

LIBRARIES = ("tokenizer", "text_encoder", "vae", "scheduler")


def distillation(settings: DistillSettings, paths: Paths) -> dict[str, Any]:
    """Return what a user and a pipeline must know of a student: plain values."""
    return {
        "base": public_name(settings.base),
        "steps": settings.steps,
        "teacher_guidance": settings.guidance,
        "guidance_scale": 1.0,
        "times": [round(level, 5) for level in paths.times[:: settings.points // settings.steps]],
        "shift": round(shift_of(paths.times), 4),
        "resolution": paths.side,
        "num_frames": settings.num_frames,
        "method": settings.stage,
    }


def shift_of(times: list[float]) -> float:
    """Return r of the time shift t = r u / (1 + (r - 1) u) of levels that are evenly spaced in u; 1 for one step."""
    if len(times) < 3:
        return 1.0
    even, level = 1 - 1 / (len(times) - 1), times[1]
    return level * (1 - even) / (even * (1 - level))


def export_lora(folder: Path, weights: dict[str, Tensor], settings: DistillSettings, paths: Paths) -> Path:
    """Write the student's adapter to `folder`/lora in half precision, in place of an earlier one; return that folder.

    Args:
        folder: Of the run; pictures in it are shown on the card.
        weights: From `folded_weights`.
        settings: Of the run.
        paths: Of the teacher.
    """
    facts, name = distillation(settings, paths), folder.resolve().name
    small = {key: value.half() for key, value in weights.items()}
    with finished_folder(folder / "lora") as temporary:
        write_lora(temporary, name, small, {}, facts["base"], {DISTILLED: json.dumps(facts)})
        add_records(temporary, folder, settings, settings.max_steps)
        load = [
            f"pipe = PTDiTPipeline.from_pretrained({facts['base']!r})",
            "pipe.load_lora_weights(FOLDER)  # this folder",
        ]
        comfyui = (
            f"ComfyUI: put `comfyui/{name}.safetensors` into `models/loras`; LoraLoaderModelOnly with strength 1, "
            f"and KSampler with steps {settings.steps}, cfg 1.0, sampler euler, scheduler simple. There is nothing "
            "between strength 0 and 1."
        )
        (temporary / "README.md").write_text(card(temporary, facts, settings, load, comfyui), encoding="utf-8")
    return folder / "lora"


def export_model(
    folder: Path, student: PTDiTTransformer3DModel, base: BaseModel, settings: DistillSettings, paths: Paths
) -> Path:
    """Write the student as model folder `folder`/model, with the other parts of the base; return that folder."""
    facts, target = distillation(settings, paths), folder / "model"
    with new_folder(target) as temporary:
        student.register_to_config(_name_or_path="")  # not a folder of this machine
        student.save_pretrained(temporary / "transformer")
        for part in LIBRARIES:
            if (base.folder / part).is_dir():
                shutil.copytree(base.folder / part, temporary / part)
        shutil.copy(base.folder / "model_index.json", temporary / "model_index.json")
        replace_json(temporary / MODEL_FILE, facts)
        add_records(temporary, folder, settings, settings.max_steps)
        load = ["pipe = PTDiTPipeline.from_pretrained(FOLDER)  # this folder"]
        comfyui = f"ComfyUI: KSampler with steps {settings.steps}, cfg 1.0, sampler euler, scheduler simple."
        (temporary / "README.md").write_text(card(temporary, facts, settings, load, comfyui), encoding="utf-8")
    return target


def card(folder: Path, facts: dict[str, Any], settings: DistillSettings, load: list[str], comfyui: str) -> str:
    """Return the model card of a student.

    Args:
        folder: That gets the card; a sheet in it is shown.
        facts: From `distillation`.
        settings: Of the run.
        load: Lines of Python that make `pipe`.
        comfyui: How ComfyUI uses it.
    """
    base, steps = in_markdown(facts["base"]), facts["steps"]
    prompt = settings.shown[0].text if settings.shown else "a picture"
    kind = "LoRA" if settings.rank else "Model"
    frames = f", num_frames={facts['num_frames']}" if facts["num_frames"] > 1 else ""
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: diffusers",
        f"tags: [{'lora, ' if settings.rank else ''}text-to-{'video' if frames else 'image'}, ptdit, distillation]",
        "---",
        "",
        f"# {kind} of {steps} steps, distilled from {base}",
        "",
        f"Makes in {steps} forwards what its teacher {base} makes in {2 * settings.teacher_steps}, with the guidance "
        f"{facts['teacher_guidance']:g} built in. Use it with `guidance_scale=1`, `num_inference_steps={steps}`, and "
        f"with the scheduler of {base} as it is (time shift {facts['shift']:g} at {facts['resolution']} pixels, noise "
        f"levels {', '.join(f'{level:g}' for level in facts['times'])}). Guidance above 1 overdrives it, a negative "
        "prompt has no effect, and it was not trained for other numbers of steps.",
        "",
        "```python",
        "from ptdit_diffusers import PTDiTPipeline",
        "",
        *load,
        f"made = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale=1{frames})",
        "```",
        "",
        comfyui,
        "",
    ]
    if (folder / "sheet.png").is_file():
        lines += ["## Pictures", "", "![teacher, and steps of the training from left to right](sheet.png)", ""]
        lines += [f"{i}. {in_markdown(each.text)} (seed {each.seed})" for i, each in enumerate(settings.shown)]
        lines += [""]
    rows = [f"| {name} | {value} |" for name, value in shown_settings(settings).items()]
    return "\n".join([*lines, "## Settings", "", "| setting | value |", "| --- | --- |", *rows, ""])
