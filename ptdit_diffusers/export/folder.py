"""Writes the Hub folder: weights, configurations, code, sample images, card and hashes; completely or not at all."""

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.files import file_hash
from ptdit_diffusers.core.folder_files import CLASS_PIPELINES, first_foreign, inside, model_files, new_folder
from ptdit_diffusers.core.folder_files import read_index as read_model_index

from .card import write_card
from .code import write_code

REFUSED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
HASHES = "SHA256SUMS"


class ExportError(ValueError):
    """The model cannot be exported as asked; the message says why, and what to do."""


def export(
    model: str | Path,
    output: str | Path,
    prompts: list[str] | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a folder that can be uploaded as it is and loads with and without this package.

    Args:
        model: Folder of a PT-DiT or class-conditional pipeline.
        output: Folder to write.
        prompts: Prompts of the sample images, or names or numbers of classes, with seeds 0, 1, ...; without them
            there are no images.
        license: License of the weights as the Hub spells it, e.g. "apache-2.0"; None keeps that of the model's own
            card, and is "other" without one.
        overwrite: Replace `output` if it is a folder that was exported before.

    Returns:
        Names of all files in the folder, sorted.

    Raises:
        ExportError: The model is not complete, holds weights that are not safetensors, or `output` exists.
    """
    model, output = Path(model), Path(os.path.abspath(output))
    index = read_index(model)
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(output, lambda: check_output(output, overwrite)) as part:
        copy_components(model, index, part)
        write_code(part, index["_class_name"])
        images = generate_samples(part, prompts or [], index["_class_name"])
        card = model / "README.md"
        if card.is_file() and not inside(card, model):
            raise ExportError(f"{card} is a link to a file outside of the model; put the file itself there")
        write_card(part, card, output.name, license, images, index["_class_name"])
        return write_hashes(part)


def read_index(model: Path) -> dict[str, Any]:
    """Return the model's index, with every library named as diffusers itself would write it."""
    try:
        index = read_model_index(model)
    except (OSError, ValueError) as error:
        raise ExportError(f"{model} holds no model: model_index.json cannot be read ({error})") from error
    class_name = index["_class_name"]
    if not class_name.startswith("PTDiT") and class_name not in CLASS_PIPELINES:
        ours = " or ".join(["PTDiTPipeline", *CLASS_PIPELINES])
        raise ExportError(f"{model} holds a {class_name}, not a {ours}")
    if class_name.startswith("PTDiT"):
        index["_class_name"] = "PTDiTPipeline"
    for name, source in index.items():
        if isinstance(source, list) and source[0] and source[0].split(".")[0] == "ptdit_diffusers":
            index[name] = ["diffusers", source[1]]
    return index


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an exported folder, and that only with `overwrite`."""
    if not output.exists():
        return
    if not (output / HASHES).is_file() or not (output / "model_index.json").is_file():
        raise ExportError(f"{output} exists and is not an exported folder; name a new one")
    if not overwrite:
        raise ExportError(f"{output} exists; name a new folder or add --overwrite")
    lines = (output / HASHES).read_text(encoding="utf-8", errors="replace").splitlines()
    written = {HASHES, "README.md", *(line.partition("  ")[2] for line in lines)}
    foreign = first_foreign(output, written.__contains__)
    if foreign is not None:
        raise ExportError(f"{output} holds {foreign}, which no export wrote, so it is not replaced; move it away")


def copy_components(model: Path, index: dict[str, Any], part: Path) -> None:
    """Copy the folders that the index names: weights as safetensors, configurations, tokenizer files."""
    present = []
    for name, source in index.items():
        if not isinstance(source, list) or not source[0]:
            continue
        if not (model / name).is_dir():
            raise ExportError(f"the model folder {model} is not complete: {name} is missing")
        for path in sorted((model / name).glob("*")):
            if path.suffix in REFUSED_ENDINGS:
                raise ExportError(
                    f"{path} may hold code; only safetensors are exported: load the model and save_pretrained it again"
                )
        present.append(name)
    try:
        files = model_files(model)
    except ValueError as error:
        raise ExportError(str(error)) from error
    for file in files:
        if file.split("/")[0] in present:
            (part / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(model / file, part / file)
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def generate_samples(part: Path, prompts: list[str], pipeline: str) -> dict[str, str]:
    """Generate sample images with the exported weights and return {file name in the folder: prompt}."""
    if not prompts:
        return {}
    import torch

    import ptdit_diffusers

    pipe = getattr(ptdit_diffusers, pipeline).from_pretrained(part)
    pipe.set_progress_bar_config(disable=True)
    (part / "samples").mkdir()
    images = {}
    for seed, prompt in enumerate(prompts):
        name = f"samples/{seed}.png"
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed)).images[0].save(part / name)
        images[name] = prompt
    del pipe
    gc.collect()  # Windows renames no folder whose weights are still mapped
    return images


def write_hashes(folder: Path) -> list[str]:
    """Write the SHA-256 of every file but the card, which changes when it is uploaded; return all names, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in names if name != "README.md"]
    (folder / HASHES).write_text("".join(lines), encoding="utf-8", newline="\n")
    return sorted([*names, HASHES])
