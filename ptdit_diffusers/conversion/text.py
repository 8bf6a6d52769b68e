"""The T5 text encoder and its tokenizer: from a transformers folder, or from a single file with T5's names.

Independent of the transformer; the caller compares widths.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ptdit_diffusers.core.checkpoint_names import ConversionError, Shapes, check_weights, shapes_of
from ptdit_diffusers.core.configuration import count, length
from ptdit_diffusers.core.documents import read_json
from ptdit_diffusers.core.model_folder import check_count

from .containers import Weights, one_line
from .networks import Part, build_for, weights_in_words
from .spiece import read_spiece

FINAL_NORM = "encoder.final_layer_norm.weight"
TABLE, TIED_TABLE = "shared.weight", "encoder.embed_tokens.weight"
WEIGHT_FILES = (  # in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WIDTHS = {512: "T5-small", 768: "T5-base", 1024: "T5-large", 2048: "T5-XL", 4096: "T5-XXL"}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def plan_text_encoder(path: Path) -> Part:
    """Open a T5 encoder, read or infer its configuration, check all its weights.

    Args:
        path: A folder that transformers wrote, a diffusers folder with `text_encoder` in it, or a checkpoint file.
            Only the encoder of a whole T5 is used.

    Raises:
        ConversionError: There is no such encoder, or its weights are not exactly those of a T5 encoder.
    """
    given = None
    if path.is_dir():
        folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        given = read_config(folder)
        path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), folder)
        if path == folder:
            raise ConversionError(f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
    weights = Weights(path)
    weights.rename(encoder_names(list(weights.facts)))
    shapes = weights.shapes
    if given is not None:
        try:
            check_count(folder / "config.json", "num_layers", given.num_layers, count(shapes, "encoder.block."))
        except ValueError as error:
            raise ConversionError(str(error)) from error
    config = given or infer_t5(shapes)
    model = build_for(path, T5EncoderModel, config)
    expected = shapes_of(model.state_dict())
    expected.pop(TIED_TABLE, None)
    check_weights(path, f"a T5 encoder of width {config.d_model}", expected, shapes)
    part = Part("text_encoder", "model", weights, model)
    name = WIDTHS.get(config.d_model, "a T5 of no known size")
    part.facts = [f"{weights_in_words(part)}; {name}, width {config.d_model}, {config.num_layers} layers"]
    return part


def read_config(folder: Path) -> T5Config:
    """Return the configuration in a transformers folder.

    Raises:
        ConversionError: There is none, or it is not that of a T5.
    """
    path = folder / "config.json"
    try:
        content: dict[str, Any] = read_json(path)
        kind = content.get("model_type")
    except FileNotFoundError:
        raise ConversionError(f"{folder} holds no text encoder: it has no config.json") from None
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path} cannot be read: {one_line(error)}") from error
    if kind != "t5":
        raise ConversionError(f"{folder} holds a {kind} model; the text encoder must be a T5 (model_type t5)")
    try:
        return T5Config.from_dict(content)
    except Exception as error:  # of many kinds: it may hold anything
        raise ConversionError(f"{path} is not the configuration of a T5: {one_line(error)}") from error


def encoder_names(names: list[str]) -> dict[str, str]:
    """Return name -> name in the file of the encoder's weights.

    The names have no prefix (`text_encoders.t5xxl.transformer.`), none belongs to the decoder of a whole T5, and the
    token embedding has one name, although it can have two in files.
    """
    prefix = next((name.removesuffix(FINAL_NORM) for name in names if name.endswith(FINAL_NORM)), "")
    found = {name.removeprefix(prefix): name for name in names}
    if TABLE in found:
        found.pop(TIED_TABLE, None)
    elif TIED_TABLE in found:
        found[TABLE] = found.pop(TIED_TABLE)
    decoder = ("decoder.", "lm_head.")
    return {name: given for name, given in found.items() if FINAL_NORM not in found or not name.startswith(decoder)}


def infer_t5(shapes: Shapes) -> T5Config:
    """Return the configuration of a T5 encoder with weights of these shapes, where they do not fit that of T5-XXL."""
    first = "encoder.block.0.layer."
    heads = length(shapes, f"{first}0.SelfAttention.relative_attention_bias.weight", 1, 64) or 64
    gated = f"{first}1.DenseReluDense.wi.weight" not in shapes
    return T5Config(
        vocab_size=length(shapes, TABLE, 0, 32128),
        d_model=length(shapes, TABLE, 1, 4096),
        d_kv=max(1, length(shapes, f"{first}0.SelfAttention.q.weight", 0, 4096) // heads),
        d_ff=length(shapes, f"{first}1.DenseReluDense.wi{'_0' if gated else ''}.weight", 0, 10240),
        num_layers=count(shapes, "encoder.block.") or 24,
        num_heads=heads,
        relative_attention_num_buckets=length(shapes, f"{first}0.SelfAttention.relative_attention_bias.weight", 0, 32),
        feed_forward_proj="gated-gelu" if gated else "relu",
        is_encoder_decoder=False,
        architectures=["T5EncoderModel"],
    )


def find_tokenizer(given: Path | None, text_encoder: Path | None) -> Path | None:
    """Return the folder of the tokenizer: the one given, or one in or beside the text encoder's folder.

    Raises:
        ConversionError: The given folder holds no tokenizer.
    """
    if given is not None:
        for folder in (given / "tokenizer", given):
            if holds_tokenizer(folder):
                return folder
        raise ConversionError(f"{given} is not a folder with a tokenizer ({' or '.join(TOKENIZER_FILES)})")
    if text_encoder is None:
        return None
    folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
    places = (folder / "tokenizer", folder, folder.parent / "tokenizer")
    return next((place for place in places if holds_tokenizer(place)), None)


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        ConversionError: It cannot be loaded.
    """
    if not (folder / "tokenizer.json").is_file():
        return read_spiece(folder / "spiece.model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own errors
        raise ConversionError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
