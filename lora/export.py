"""The result: the LoRA for diffusers, the LoRA for ComfyUI, settings, a model card, and the upload.

Files are written to a temporary folder, which is renamed when all of them are there. What is uploaded names no path.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save
from torch import Tensor

from ptdit_diffusers.core.few_steps import LORA_FILE
from ptdit_diffusers.core.folder_files import first_foreign, move, new_folder
from ptdit_diffusers.pipelines.ptdit_lora_text import TEXT_PREFIX
from ptdit_diffusers.training.checkpoint import whole
from ptdit_diffusers.training.latents import write_tensors
from ptdit_diffusers.training.record import versions

from .adapter import dora_scale_for_comfyui, is_of_text, named_layers
from .config import LoRASettings, TrainingSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMFYUI_PREFIX = "diffusion_model."
COMFYUI_TEXT_PREFIX = "text_encoders.t5xxl.transformer."  # ComfyUI's name of a T5 of any size
OUR_FILES = re.compile(
    r"pytorch_lora_weights\.safetensors|comfyui/[^/]+\.safetensors|(sheet|loss)\.png|settings\.json|README\.md"
)
LOCAL = (
    "output_dir",
    "cache_dir",
    "prior_prompts",
    "prompts",
    "paths_dir",
)  # settings that are folders or files of this machine
MODEL_FILE = "distillation.json"  # in a model folder whose weights are those of a student of few steps
HUB_ID = re.compile(r"(hub:)?([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def export(
    target: Path,
    name: str,
    weights: dict[str, Tensor],
    settings: LoRASettings,
    step: int,
    base_weights: dict[str, Tensor],
    resolution: int = 0,
) -> Path:
    """Write a LoRA to the folder `target`, in place of an earlier one, and return it. It names no path.

    Args:
        target: Gets diffusers' file, `comfyui`/NAME.safetensors, the card, and the pictures of the run.
        name: Of ComfyUI's file.
        weights: From `folded_weights`.
        settings: Settings of the run.
        step: Steps trained.
        base_weights: With DoRA, the weight of each layer under its name; else empty.
        resolution: The base model's own, for settings that name none; 0 = not known.
    """
    with finished_folder(target) as temporary:
        networks = by_network(weights)
        rank = adapter_config(networks["transformer"])["r"]
        facts = public_facts(name, settings, step, settings.resolution or resolution, rank)
        facts["trained_networks"] = ", ".join(networks)
        comfyui = write_lora(
            temporary, name, weights, base_weights, public_name(settings.base), facts, settings.save_precision
        )
        add_records(temporary, Path(settings.output_dir), settings, step)
        (temporary / "README.md").write_text(card(temporary, weights, settings, step, comfyui.name), encoding="utf-8")
    return target


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write a LoRA into; at the end it takes the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and first_foreign(target, lambda name: bool(OUR_FILES.fullmatch(name))) is not None:
        # Somebody put files of their own into it.
        move(target, target.with_name(f"{target.name}-kept-{uuid.uuid4().hex[:8]}"))
    with new_folder(target) as temporary:
        yield temporary


def add_records(temporary: Path, folder: Path, settings: TrainingSettings, step: int) -> None:
    """Copy the pictures of a run beside its result, and write down its settings."""
    for name in ("sheet.png", "loss.png"):
        if (folder / name).is_file():
            shutil.copy(folder / name, temporary / name)
    found = {"step": step, "settings": public_settings(settings), "versions": versions()}
    (temporary / "settings.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def write_lora(
    folder: Path,
    name: str,
    weights: dict[str, Tensor],
    base_weights: dict[str, Tensor],
    base: str,
    metadata: dict[str, str] | None = None,
    precision: str | None = None,
) -> Path:
    """Write the two files of a LoRA; return that of ComfyUI.

    Args:
        folder: Exists; gets diffusers' file, and `comfyui`/NAME.safetensors.
        name: Of ComfyUI's file.
        weights, base_weights: As for `export`.
        base: Name of the base model.
        metadata: Further entries of both files.
        precision: "fp32", "bf16" or "fp16", of both files; None = as the weights are.
    """
    (folder / "comfyui").mkdir()
    further = metadata or {}
    adapter, ours = {}, {}
    for network, part in by_network(weights).items():
        adapter |= {f"{network}.{key}": value for key, value in adapter_config(part).items()}
        ours |= {f"{network}.{key}": value for key, value in part.items()}
    described = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True, default=list)}
    comfyui = folder / "comfyui" / f"{name}.safetensors"
    theirs = comfyui_weights(weights, base_weights)
    files = ((folder / LORA_FILE, ours, described), (comfyui, theirs, {"format": "pt", "base": base}))
    for path, tensors, about in files:
        saved = tensors if precision is None else {key: value.to(DTYPES[precision]) for key, value in tensors.items()}
        if broken := [key for key, value in saved.items() if not value.isfinite().all()]:
            raise OSError(f"{broken[0]} is too large for save_precision={precision!r}; nearest: bf16")
        write_tensors(path, saved, about | further | hashes(saved))
    return comfyui


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of what stands behind the header of a file of these tensors, under the names of others."""
    content = save({name: value.contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def public_facts(name: str, settings: LoRASettings, step: int, side: int, rank: int) -> dict[str, str]:
    """Return what a LoRA file says of itself: Stability AI's modelspec 1.0.1, and names of kohya's that UIs read."""
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "pt-dit/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}" if side else "",
        "modelspec.trigger_phrase": settings.trigger_words,
        "ss_output_name": name,
        "ss_base_model_version": "pt-dit",
        "ss_sd_model_name": public_name(settings.base),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),  # of the file: PiSSA and OLoRA are written with twice that of the settings
        "ss_network_alpha": str(rank),  # the scale is part of the weights
        "ss_steps": str(step),
        "ss_learning_rate": str(settings.lr),
        "ss_seed": str(settings.seed),
    }
    return {key: value for key, value in facts.items() if value}


def public_name(source: str) -> str:
    """Return a model's or data set's name without folders of this machine; short names and Hub ids stay."""
    hub_id = HUB_ID.fullmatch(source) and not Path(source).exists()
    return source if hub_id else Path(source).name


def public_settings(settings: TrainingSettings) -> dict[str, object]:
    """Return the settings as they are uploaded: without folders of this machine."""
    found = {name: value for name, value in dataclasses.asdict(settings).items() if name not in LOCAL}
    if sets := found.get("datasets"):
        found["datasets"] = [{**each, "data": public_name(each["data"])} for each in sets]
    names = {name: public_name(found[name]) for name in ("base", "data") if name in found}
    return found | names | ({"start": public_lora(found["start"])} if found.get("start") else {})


def public_lora(source: str) -> str:
    """Return the name of a LoRA without folders of this machine: of OUTPUT_DIR/lora that of the run, or of a file."""
    return next((part for part in Path(source).absolute().parts[::-1] if part not in ("lora", LORA_FILE)), source)


def in_markdown(text: str) -> str:
    """Return a text that cannot end the line, table cell, code span or HTML of a card that it stands in."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def by_network(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of `transformer` and, if there are any, of `text_encoder`, each under its own names."""
    text = {key.removeprefix(TEXT_PREFIX): value for key, value in weights.items() if is_of_text(key)}
    rest = {key: value for key, value in weights.items() if not is_of_text(key)}
    return {"transformer": rest, **({"text_encoder": text} if text else {})}


def adapter_config(weights: dict[str, Tensor]) -> dict:
    """Return peft's configuration of the folded weights of a network, for the metadata: alpha is the rank."""
    layers = sorted({key.rpartition(".lora_")[0] for key in weights})
    ranks = {layer: weights[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    others = {layer: each for layer, each in ranks.items() if each != rank}
    dora = any(key.endswith("magnitude_vector") for key in weights)
    patterns = {"rank_pattern": others, "alpha_pattern": others}
    return LoraConfig(r=rank, lora_alpha=rank, use_dora=dora, target_modules=layers, **patterns).to_dict()


def comfyui_weights(weights: dict[str, Tensor], base_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names that ComfyUI's stock loader maps onto the model."""
    renamed = {}
    for key, value in weights.items():
        layer, _, kind = key.rpartition(".lora_")
        prefix = COMFYUI_TEXT_PREFIX if is_of_text(key) else COMFYUI_PREFIX
        name = prefix + layer.removeprefix(TEXT_PREFIX)
        if kind == "magnitude_vector":
            a, b = weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]
            renamed[f"{name}.dora_scale"] = dora_scale_for_comfyui(base_weights[layer], a, b, value)
        else:
            renamed[f"{name}.lora_{kind}"] = value
    return renamed


def card(folder: Path, weights: dict[str, Tensor], settings: LoRASettings, step: int, comfyui: str) -> str:
    """Return the model card: what it is, how to use it, prompts and pictures, settings."""
    adapted = [key for key in weights if key.endswith("lora_A.weight")]
    layers, of_text = len(adapted), sum(map(is_of_text, adapted))
    values = sum(value.numel() for value in weights.values())
    rank = adapter_config(by_network(weights)["transformer"])["r"]
    base = in_markdown(public_name(settings.base))
    shown = settings.shown
    prompt = shown[0].text if shown else settings.trigger_words or "a picture"
    head = [
        "---",
        f"base_model: {base}",
        "library_name: diffusers",
        "tags: [lora, text-to-image, ptdit]",
        "---",
    ]
    lines = [
        *head,
        "",
        f"# LoRA for PT-DiT ({base})",
        "",
        f"{step} steps, rank {rank} on {layers} layers, {values} values."
        + (f" Rank {rank // 2} was trained: init `{settings.init}`." if settings.init in ("pissa", "olora") else "")
        + (f" The text encoder is trained, too: {of_text} of the layers are in it." if of_text else "")
        + (f" Trigger word: `{in_markdown(settings.trigger_words)}`." if settings.trigger_words else ""),
        "",
        "```python",
        "from ptdit_diffusers import PTDiTPipeline",
        "",
        f"pipe = PTDiTPipeline.from_pretrained({base!r})",
        "pipe.load_lora_weights(FOLDER)  # this folder",
        f"picture = pipe({prompt!r}).images[0]",
        "```",
        "",
        f"ComfyUI: put `comfyui/{comfyui}` into `models/loras`. The scale alpha / rank is part of the weights, so "
        "strength 1 is the trained strength."
        + (" Load it with the node that takes model and CLIP, not with that for the model only." if of_text else ""),
        "",
    ]
    if (folder / "sheet.png").is_file():
        lines += ["## Pictures", "", "![steps from left to right, prompts from top to bottom](sheet.png)", ""]
    if shown:
        lines += [f"{i}. {in_markdown(each.text)} (seed {each.seed})" for i, each in enumerate(shown)]
        lines += [""]
    rows = [f"| {name} | {value} |" for name, value in shown_settings(settings).items()]
    return "\n".join([*lines, "## Settings", "", "| setting | value |", "| --- | --- |", *rows, ""])


def shown_settings(settings: TrainingSettings) -> dict[str, object]:
    """Return the settings that differ from their defaults, without folders of this machine."""
    hidden = ("data", "validation_prompts", "resume", "push_to_hub")
    public = public_settings(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    defaults |= dict.fromkeys(("optimizer_args", "rank_pattern", "lr_pattern"), {})
    return {
        name: value if isinstance(value, (int, float)) else in_markdown(str(value))
        for name, value in public.items()
        if value != defaults[name] and name not in hidden
    }


def check_push(repository: str) -> None:
    """Raise ValueError unless this machine may write to the Hub under some name."""
    try:
        HfApi().whoami()
    except Exception as error:  # of many kinds: no token, a wrong one, no network
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"push_to_hub={repository!r} needs a login to the Hub (hf auth login): {reason}") from error


def push(folder: Path, repository: str) -> str:
    """Upload the finished folder to the Hub and return its address.

    Raises:
        OSError: The Hub refused it; huggingface_hub's errors are of this kind.
    """
    api = HfApi()
    address = api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA for PT-DiT")
    return str(address)


def base_layer_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base weights of layers that were trained with DoRA, by name; all processes must call this."""
    modules = named_layers(model)
    layers = [key.rpartition(".lora_")[0] for key in weights if key.endswith("lora_magnitude_vector")]
    return {layer: whole(dequantize_module_weight(modules[layer].base_layer)) for layer in layers}
