"""Finding a model by its name and checking it, before torch or diffusers is imported."""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.embedded import embedded_model_names, embedded_model_path
from ptdit_diffusers.core.folder_files import read_index as read_model_index

from .terminal import UserError, first_line, say

if TYPE_CHECKING:
    from .. import ClassToImagePipeline, PTDiTPipeline

DEFAULT_MODEL = "shapes-128"
CLASS_PIPELINE = "ClassToImagePipeline"
EMBEDDED = {"clips": "clips-128", "views": "views-96"}  # data set -> a model of it
TOKENIZER = Path("tokenizer/tokenizer.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(name: str) -> Path | None:
    """Return the folder of a model without loading it.

    Args:
        name: A folder, the short name of an embedded model, or a Hub id OWNER/NAME.

    Returns:
        The folder, or None for a Hub id.

    Raises:
        UserError: There is no such model, or the folder holds no model of this package.
    """
    if Path(name).is_dir() and name.strip():
        folder = Path(name)
    elif name in embedded_model_names():
        folder = embedded_model_path(name)
    elif HUB_ID.fullmatch(name) and not Path(name).exists():
        return None
    else:
        what = "is a file, not a model folder" if Path(name).is_file() else "is not a folder"
        names = ", ".join(difflib.get_close_matches(name, embedded_model_names(), cutoff=0.0)) or "none"
        raise UserError(
            f"--model {name!r} {what}; give a model folder, a Hub id OWNER/NAME, or a model of this package: {names}"
        )
    check_model_folder(folder)
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete diffusers folder of a PT-DiT or class-conditional pipeline."""
    path = folder / "model_index.json"
    index = read_index(folder)
    class_name = index["_class_name"]
    if not class_name.startswith("PTDiT") and class_name != CLASS_PIPELINE:
        raise UserError(f"the folder {folder} holds a {class_name}, not a PTDiTPipeline or {CLASS_PIPELINE}")
    absent = [component for component, source in index.items() if source == [None, None]]
    if absent:
        raise UserError(
            f"the model in {folder} has no {', '.join(absent)} (null in {path.name}); convert it with all its files"
        )
    for component, source in index.items():
        if isinstance(source, list) and source[0] and not (folder / component).is_dir():
            raise UserError(f"the model folder {folder} is not complete: {component} is missing")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's `model_index.json`.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = folder / "model_index.json"
    try:
        return read_model_index(folder)
    except FileNotFoundError:
        raise UserError(f"the folder {folder} holds no model: it has no model_index.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def is_class_model(folder: Path) -> bool:
    """Return whether the model in a folder generates images of classes instead of prompts."""
    return read_index(folder).get("_class_name") == CLASS_PIPELINE


def check_class(folder: Path, name: str) -> None:
    """Refuse a class that a class-conditional model does not have, and name the nearest.

    Raises:
        UserError: There is no such class, or the transformer's configuration cannot be read.
    """
    from ptdit_diffusers.core.class_labels import class_ids

    path = folder / "transformer" / "config.json"
    try:
        classes = read_mapping(path)["num_classes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        class_ids(name, read_index(folder).get("id2label"), classes)
    except ValueError as error:
        raise UserError(f"--class: {error}".rstrip(".")) from error


def class_settings(folder: Path) -> tuple[float, int | None]:
    """Return the strength of guidance of a class-conditional model, and the one size in pixels that it can make.

    The size is None if it can make several.

    Raises:
        UserError: A configuration cannot be read.
    """
    path = folder / "transformer" / "config.json"
    try:
        config, vae = read_mapping(path), read_mapping(folder / "vae" / "config.json")
        guidance = float(read_index(folder).get("guidance_scale", 4.0))
        if config.get("_class_name") != "DiffiT2DModel" or config.get("window_size"):
            return guidance, None
        return guidance, config["sample_size"] * 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the configurations in {folder} cannot be read: {first_line(error)}") from error


def download(name: str) -> Path:
    """Download a model from the Hugging Face Hub into the local cache and return its folder.

    Raises:
        UserError: The Hub cannot be reached or has no such model.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    silence_libraries()
    from diffusers import DiffusionPipeline

    say(
        f"downloading {name} from the Hugging Face Hub to {HF_HUB_CACHE} (files in the cache are not downloaded again)"
    )
    try:
        folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # network, Hub and cache fail in many ways; all mean that there is no model to run
        raise UserError(
            f"there is no folder {name}, and it cannot be downloaded from the Hub: {first_line(error)}"
        ) from error
    check_model_folder(folder)
    return folder


def silence_libraries() -> None:
    """Import transformers and diffusers, and switch off their logs below errors and their loading bars."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers imports those parts of it that log
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def load_pipeline_class(folder: Path) -> "type[PTDiTPipeline | ClassToImagePipeline]":
    """Return the pipeline class of a folder, with the libraries silenced."""
    silence_libraries()
    from .. import ClassToImagePipeline, PTDiTPipeline

    return ClassToImagePipeline if is_class_model(folder) else PTDiTPipeline


def check_words(folder: Path, prompt: str, negative_prompt: str) -> None:
    """Refuse words that are not in a model's word list, and name the nearest that are; then what it was never taught.

    A model whose tokenizer splits words into pieces can read every word, so there is nothing to check.
    """
    model = read_word_list(folder)
    if model is None:
        return
    from tokenizers import Tokenizer

    from ptdit_diffusers.core.captions import prepare_prompts
    from ptdit_diffusers.core.vocabulary import refusal

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{folder / TOKENIZER} cannot be read as a tokenizer: {first_line(error)}") from error
    unknown: dict[str, None] = {}  # a dict keeps the order in which the words come
    refusals = []
    for text, clean in ((prompt, True), (negative_prompt, False)):
        prepared = prepare_prompts([text], clean=clean)[0]
        encoding = tokenizer.encode(prepared, add_special_tokens=False)
        if clean and not encoding.tokens:
            raise UserError(f"nothing is left of the prompt {text!r} after cleaning; use plain English words")
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            if token == model["unk_token"]:
                unknown[prepared[start:end]] = None
        refusals.append(refusal(model["vocab"], prepared, negative=not clean))
    if unknown:
        known = [word for word in model["vocab"] if word.isalpha()]
        words = "; ".join(f"{word!r} (nearest: {', '.join(nearest_words(word, known))})" for word in unknown)
        raise UserError(f"this model does not know {words}")
    for message in filter(None, refusals):
        raise UserError(message)


def check_length(folder: Path, num_frames: int, num_views: int | None) -> None:
    """Refuse views of an embedded model of clips or pictures, and videos of one of views or pictures."""
    from ptdit_diffusers.core.vocabulary import MAKES, data_set_of

    kind = data_set_of((read_word_list(folder) or {"vocab": ()})["vocab"])
    for name, wanted, fits in (("--num-frames", num_frames > 1, "clips"), ("--num-views", num_views, "views")):
        if kind and wanted and kind != fits:
            raise UserError(f"{name} does not fit this model: it makes {MAKES[kind]}; use --model {EMBEDDED[fits]}")


def read_word_list(folder: Path) -> dict | None:
    """Return the `model` of a tokenizer with one token per word, or None for a tokenizer of another kind.

    Raises:
        UserError: The file is no tokenizer.
    """
    path = folder / TOKENIZER
    try:
        model = read_mapping(path)["model"]
        if model.get("type") != "WordLevel":
            return None
        return {"vocab": dict(model["vocab"]), "unk_token": model["unk_token"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a tokenizer: {type(error).__name__}: {first_line(error)}"
        ) from error


def nearest_words(word: str, known: list[str]) -> list[str]:
    """Return the three known words that are spelled most like the given one."""
    return difflib.get_close_matches(word, known, n=3, cutoff=0.0)
