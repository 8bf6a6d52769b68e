"""The model of a run: its windows and buckets at every stage, the transformer that is trained, and the result."""

import copy
import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.core.folder_files import new_folder
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.buckets import bucket_sizes
from ptdit_diffusers.training.networks import Networks, text_encoder_of, transformer_of
from ptdit_diffusers.training.own_data.settings import NEW, TRAINED, OwnDataSettings
from ptdit_diffusers.training.task import trained_parameters


def make_base(settings: OwnDataSettings, parts: Mapping[str, Path] | None = None) -> BaseModel:
    """Return the model whose parts the run starts from; `parts` stand elsewhere.

    Raises:
        ValueError: There is no such model.
    """
    base = BaseModel(settings.components, parts)
    kind = base.transformer_config.get("_class_name")
    if kind != PTDiTTransformer3DModel.__name__:
        raise ValueError(f"start {base.name!r} is a model of class {kind}, not {PTDiTTransformer3DModel.__name__}.")
    if settings.start == NEW:
        base.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=settings.size.base_tokens
        )
    return base


def windows_per_side(settings: OwnDataSettings, base: BaseModel) -> int:
    """Return how many windows a square picture has along one side, at any resolution."""
    number = settings.size.num_windows if settings.start == NEW else base.transformer_config["num_windows"]
    return max(1, round(number**0.5))


def stage_sizes(settings: OwnDataSettings, base: BaseModel) -> dict[int, list[tuple[int, int]]]:
    """Return the legal sizes (height, width) of every resolution; sides are whole windows.

    Raises:
        ValueError: A resolution is not possible; names the nearest.
    """
    side, token, found = windows_per_side(settings, base), 16, {}
    for stage in settings.stages:
        if stage.resolution % (token * side):
            low = max(token * side, stage.resolution // (token * side) * token * side)
            raise ValueError(
                f"stages.resolution={stage.resolution} is not a multiple of {token * side} ({side} windows of whole "
                f"tokens, {token} pixels each); nearest: {low} or {low + token * side}."
            )
        sizes = bucket_sizes(stage.resolution, stage.resolution // side, stage.buckets)
        if found.setdefault(stage.resolution, sizes) != sizes:
            raise ValueError(
                f"two stages of resolution {stage.resolution} have different buckets; give both the same."
            )
    return found


def make_transformer(settings: OwnDataSettings, base: BaseModel) -> PTDiTTransformer3DModel:
    """Return the transformer in float32, with windows for the last stage; what is trained requires gradients."""
    side, last = windows_per_side(settings, base), settings.stages[-1].resolution
    window = last // 16 // side
    if settings.start == NEW:
        torch.manual_seed(settings.seed)  # the same on every process
        transformer = PTDiTTransformer3DModel(
            num_attention_heads=settings.size.heads,
            attention_head_dim=settings.size.head_width,
            num_layers=settings.size.layers,
            num_windows=settings.size.num_windows,
            window_size=(1, window, window),
            proxy_ratio=(1, window, window),
            caption_channels=base.config("text_encoder")["d_model"],
            in_channels=base.config("vae").get("z_channels", 4),
            use_additional_conditions=False,
        )
    else:
        transformer = PTDiTTransformer3DModel.from_pretrained(
            base.part("transformer"), dtype=torch.float32, **_windows(base, window)
        )
    frames = max(transformer.config.sample_frames, settings.data.latent_frames)
    transformer.register_to_config(_name_or_path="", sample_frames=frames)  # no folder of this machine
    choose_trained(settings, transformer)
    return transformer.train()


def make_networks(settings: OwnDataSettings, base: BaseModel) -> PTDiTTransformer3DModel | Networks:
    """Return all that is trained: the transformer, together with the text encoder where that is trained, too."""
    transformer = make_transformer(settings, base)
    if not settings.text.train:
        return transformer
    return Networks(transformer, base.load_text_encoder(torch.device("cpu")).requires_grad_(True))


def to_bf16(transformer: PTDiTTransformer3DModel) -> None:
    """Turn the weights to bf16, except those that the model keeps in float32."""
    for name, parameter in transformer.named_parameters():
        if not any(kept in name for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()


def outline(settings: OwnDataSettings, base: BaseModel) -> PTDiTTransformer3DModel:
    """Return the transformer without values (on the device "meta"), for what depends on its sizes alone."""
    with torch.device("meta"):
        if settings.start == NEW:
            return make_transformer(settings, base)
        transformer = PTDiTTransformer3DModel.from_config(base.transformer_config)
        choose_trained(settings, transformer)
    return transformer.train()


def _windows(base: BaseModel, window: int) -> dict[str, Any]:
    """Return windows for the last stage where the model was trained at another size; they are not in the weights."""
    config = base.transformer_config
    frames, *sides = config["window_size"]
    if max(sides) == window:
        return {}
    first, *ratio = config["proxy_ratio"]
    ratio = [max(1, round(window * part / of)) for part, of in zip(ratio, sides, strict=True)]
    return {"window_size": (frames, window, window), "proxy_ratio": (first, *ratio)}


def choose_trained(settings: OwnDataSettings, transformer: PTDiTTransformer3DModel) -> None:
    """Let only what is trained require gradients; puts the LoRA on the model where that is what is trained."""
    if settings.train == "all":
        return
    transformer.requires_grad_(False)
    if settings.train == "lora":
        torch.manual_seed(settings.seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TRAINED["lora"])
        transformer.add_adapter(config)
        return
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".attn" in name)


def export_model(
    settings: OwnDataSettings, base: BaseModel, model: PTDiTTransformer3DModel | Networks, folder: Path, card: str
) -> None:
    """Write a whole pipeline folder, which `ptdit generate --model` takes; a LoRA is merged and also beside it.

    Args:
        settings: Of the run.
        base: With the other parts.
        model: What was trained.
        folder: To write; it is replaced as a whole.
        card: Text of its README.md.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    transformer, text_encoder = transformer_of(model), text_encoder_of(model)
    with new_folder(folder) as made:
        for part in ("vae", "tokenizer") if text_encoder else ("vae", "text_encoder", "tokenizer"):
            earlier = sorted(folder.parent.glob(f"step-*/{part}"))  # of exports on the way
            shutil.copytree(base.part(part), made / part, copy_function=partial(link_or_copy, earlier[:1]))
        if text_encoder:
            text_encoder.save_pretrained(made / "text_encoder")
        base.scheduler.save_pretrained(made / "scheduler")
        if settings.train == "lora":
            layers = {name: value.contiguous() for name, value in get_peft_model_state_dict(transformer).items()}
            PTDiTPipeline.save_lora_weights(made / "lora", transformer_lora_layers=layers)
            transformer = copy.deepcopy(transformer)
            transformer.fuse_lora()
            transformer.unload_lora()
        transformer.save_pretrained(made / "transformer")
        parts = {"tokenizer": None, "text_encoder": None, "vae": None}
        PTDiTPipeline(transformer=transformer, scheduler=base.scheduler, **parts).save_config(made)
        complete_index(base.folder, made)
        (made / "README.md").write_text(card, encoding="utf-8")


def link_or_copy(earlier: Sequence[Path], source: str, target: str) -> None:
    """Copy a file, or give that of an earlier export a second name where it has the same content."""
    for folder in earlier:
        twin = folder / Path(source).name
        if twin.is_file() and filecmp.cmp(source, twin, shallow=False):
            try:
                return os.link(twin, target)
            except OSError:  # the file system cannot
                break
    shutil.copy2(source, target)


def complete_index(source: Path, folder: Path) -> None:
    """Name the parts that were copied in the index of a folder, as the source names them."""
    index, known = read_mapping(folder / "model_index.json"), read_mapping(source / "model_index.json")
    index |= {part: known[part] for part in ("vae", "text_encoder", "tokenizer")}
    index.pop("_name_or_path", None)
    replace_json(folder / "model_index.json", index)


def load_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put trained values into the model, by name.

    Raises:
        ValueError: They are those of another model.
    """
    own = trained_parameters(model)
    if own.keys() != values.keys() or any(own[name].shape != values[name].shape for name in own):
        raise ValueError("the values are those of a model of other sizes, or of another setting `train`.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])


def plain(settings: OwnDataSettings) -> dict[str, Any]:
    """Return the settings as plain values."""
    return asdict(settings)
