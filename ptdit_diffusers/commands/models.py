"""Finding a model by its name and checking it, before torch or diffusers is imported."""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.embedded import WEIGHTS, embedded_model_names, embedded_model_path
from ptdit_diffusers.core.few_steps import embedded_student, embedded_students
from ptdit_diffusers.core.folder_files import CLASS_PIPELINES
from ptdit_diffusers.core.folder_files import read_index as read_model_index

from .terminal import UserError, first_line, say

if TYPE_CHECKING:
    from .. import ClassToImagePipeline, DiffiTImagePipeline, PTDiTPipeline

DEFAULT_MODEL = "shapes-128"
CLASS_STEPS = 250  # of classes, by default
SMALL_EDM_STEPS, EDM_STEPS = 18, 40  # of models without a VAE: up to 32 px, and above
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


def find_student(folder: Path, name: str) -> Path:
    """Return the LoRA file of few steps of an embedded model.

    Raises:
        UserError: It has none, or the folder is another model.
    """
    student = embedded_student(name) if folder.parent == WEIGHTS else None
    if student is None:
        known = ", ".join(embedded_students()) or "none"
        raise UserError(
            f"--turbo: the model {name} has no LoRA of few steps in this package; models that have: {known}"
        )
    return student


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete diffusers folder of one of our pipelines."""
    path = folder / "model_index.json"
    index = read_index(folder)
    class_name = index["_class_name"]
    if not class_name.startswith("PTDiT") and class_name not in CLASS_PIPELINES:
        ours = " or ".join(["PTDiTPipeline", *CLASS_PIPELINES])
        raise UserError(f"the folder {folder} holds a {class_name}, not a {ours}")
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
    return read_index(folder).get("_class_name") in CLASS_PIPELINES


class ClassSettings(NamedTuple):
    """What a class-conditional model says about itself.

    Attributes:
        classes: Number of classes.
        names: Class number -> name, or None.
        guidance: Strength of guidance by default.
        steps: Sampling steps by default.
        only_size: Side in pixels that it can make; None if it can make several.
        network: Name of the network's component.
    """

    classes: int
    names: dict[str, str] | None
    guidance: float
    steps: int
    only_size: int | None
    network: str


def class_settings(folder: Path) -> ClassSettings:
    """Return the settings of the class-conditional model in a folder.

    Raises:
        UserError: A configuration cannot be read.
    """
    index = read_index(folder)
    network = CLASS_PIPELINES[index["_class_name"]]
    path = folder / network / "config.json"
    try:
        config = read_mapping(path)
        classes, names, side = config["num_classes"], index.get("id2label"), config["sample_size"]
        if network == "unet":
            steps = SMALL_EDM_STEPS if side <= 32 else EDM_STEPS
            return ClassSettings(classes, names, float(index.get("guidance_scale", 1.0)), steps, None, network)
        path = folder / "vae" / "config.json"
        levels = read_mapping(path).get("block_out_channels", (0,) * 4)
        is_fixed = config.get("_class_name") == "DiffiT2DModel" and not config.get("window_size")
        only_size = side * 2 ** (len(levels) - 1) if is_fixed else None
        guidance = float(index.get("guidance_scale", 4.0))
        return ClassSettings(classes, names, guidance, CLASS_STEPS, only_size, network)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def check_class(folder: Path, name: str) -> ClassSettings:
    """Refuse a class that a class-conditional model does not have, and name the nearest; return its settings.

    Raises:
        UserError: There is no such class, or a configuration cannot be read.
    """
    from ptdit_diffusers.core.class_labels import class_ids

    settings = class_settings(folder)
    if not settings.classes:
        raise UserError(f"the model in {folder} has no classes; use it in Python, with DiffiTImagePipeline")
    try:
        class_ids(name, settings.names, settings.classes)
    except ValueError as error:
        raise UserError(f"--class: {error}".rstrip(".")) from error
    return settings


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
        from ..conversion.hub import HubSource, trouble

        reason = trouble(HubSource(name, None, ""), error.__cause__ or error)
        raise UserError(f"there is no folder {name}, and it cannot be downloaded from the Hub: {reason}") from error
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


def load_pipeline_class(folder: Path) -> "type[PTDiTPipeline | ClassToImagePipeline | DiffiTImagePipeline]":
    """Return the pipeline class of a folder, with the libraries silenced."""
    silence_libraries()
    import ptdit_diffusers

    name = read_index(folder)["_class_name"]
    return getattr(ptdit_diffusers, name if name in CLASS_PIPELINES else "PTDiTPipeline")


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
