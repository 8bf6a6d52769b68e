"""What is done with the files of strangers, and what may come of it: the named errors, soon, and no file elsewhere."""

import gc
import importlib.util
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import files

LONGEST = 5.0  # seconds of processor time for one input; the largest takes 0.3


class Finding(AssertionError):
    """An input that is answered wrongly."""


@dataclass
class Place:
    """Where one process tries inputs: a folder with `in`, `out`, a whole model, and files that nobody may touch."""

    folder: Path
    model: Path

    @classmethod
    def build(cls, folder: Path, model: Path) -> "Place":
        """Make the folders in an empty one, with a copy of a small model."""
        for name in ("work/in", "work/out", "work/data"):
            (folder / name).mkdir(parents=True)
        shutil.copytree(model, folder / "work/model")
        files.Image.new("RGB", (64, 64)).save(folder / "work/data/good.png")
        for name in ("outside.png", "outside", "work/outside.png", "work/out/outside", "outside.json"):
            (folder / name).write_text("not to be read or changed", encoding="utf-8")
        return cls(folder, folder / "work/model")

    def snapshot(self) -> dict[str, int]:
        """Return name -> size of all files outside of `in`."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and "in" not in path.parts)
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in paths}

    def write(self, name: str, content: bytes) -> Path:
        """Write an input."""
        path = self.folder / "work/in" / name
        path.write_bytes(content)
        return path


@contextmanager
def only(*errors: type[Exception]) -> Iterator[None]:
    """Let these errors pass, if they have a text; anything else, or a long time, is a finding."""
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        if not str(error).strip():
            raise Finding(f"{type(error).__name__} without a text") from error
    except Finding:
        raise
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    if time.process_time() - begin > LONGEST:
        raise Finding(f"{time.process_time() - begin:.0f} s")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def convert(place: Place, name: str, content: bytes, part: str) -> None:
    """Convert a checkpoint to a folder, which is complete or not there, and remove it."""
    from ptdit_diffusers.conversion.containers import ConversionError
    from ptdit_diffusers.conversion.folder import convert

    path, output = place.write(name, content), place.folder / "work/out/model"
    try:
        with only(ConversionError):
            convert(**{part: path}, output=output, num_heads=2 if part == "transformer" else None)
            if not (output / "model_index.json").is_file():
                raise Finding("no model was written")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def single_gguf(place: Place, content: bytes) -> None:
    """Read the header of a GGUF file, and its weights where the package gguf is installed."""
    from ptdit_diffusers.conversion.containers import ConversionError
    from ptdit_diffusers.conversion.gguf_header import check_gguf
    from ptdit_diffusers.conversion.quantize import read_gguf

    path = place.write("x.gguf", content)
    with only(ConversionError):
        (check_gguf if importlib.util.find_spec("gguf") is None else read_gguf)(path)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@cache
def small_transformer() -> Any:
    """Return a transformer that fits some of the inputs."""
    from ptdit_diffusers import PTDiTTransformer3DModel

    return PTDiTTransformer3DModel(2, 24, num_layers=1, caption_channels=32)


def load_lora(place: Place, content: bytes) -> None:
    """Load a LoRA into a transformer, and take it out again if it was taken."""
    from ptdit_diffusers import PTDiTPipeline

    path = place.write("lora.safetensors", content)
    transformer = small_transformer()
    with only(ValueError, OSError):
        weights, metadata = PTDiTPipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, return_lora_metadata=True, local_files_only=True
        )
        PTDiTPipeline.load_lora_into_transformer(weights, transformer, adapter_name="a", metadata=metadata)
    if getattr(transformer, "peft_config", None):
        transformer.delete_adapters("a")


# --- model folders ---------------------------------------------------------------------------------------------------

JSON_FILES = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
ODD_SOURCES = st.lists(st.sampled_from(("diffusers", "os", "../x", None, 3)), max_size=3)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, bytes | dict[str, Any]]:
    """A file of a model folder and what it holds instead, or the entries that change in it."""
    name = draw(st.sampled_from(JSON_FILES))
    if draw(st.integers(0, 4)) == 0:
        return name, draw(files.ODD_TEXTS | st.text(max_size=20)).encode("utf-8", "surrogatepass")
    if name == "model_index.json" and draw(st.booleans()):
        names = st.sampled_from(("../outside", "/etc", "vae", "tokenizer", "_class_name", "x", "scheduler"))
        return name, draw(st.dictionaries(names, ODD_SOURCES | files.ODD_JSON, max_size=3))
    known = sorted(_json_of(name)) or ["a"]
    return name, draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=3), files.ODD_JSON, max_size=3))


@cache
def _json_of(name: str) -> dict[str, Any]:
    from ptdit_diffusers import embedded_model_path

    return json.loads((embedded_model_path("shapes-128") / name).read_text(encoding="utf-8"))


@contextmanager
def changed(place: Place, name: str, content: bytes | dict[str, Any]) -> Iterator[None]:
    """Change a file of the model within a block."""
    path = place.model / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_bytes()) | content).encode()
    aside = path.with_name("aside")
    path.rename(aside)
    path.write_bytes(content)
    try:
        yield
    finally:
        aside.replace(path)


def check_model(place: Place, change: tuple[str, bytes | dict[str, Any]]) -> None:
    """Look at a model folder as `ptdit generate` does before it loads anything."""
    from ptdit_diffusers.commands.loading import check_parts
    from ptdit_diffusers.commands.models import (
        check_class,
        check_length,
        check_model_folder,
        check_words,
        is_class_model,
    )
    from ptdit_diffusers.commands.terminal import UserError

    with changed(place, *change), only(UserError):
        check_model_folder(place.model)
        if is_class_model(place.model):
            check_class(place.model, "3")
        else:
            check_words(place.model, "a red circle", "")
            check_length(place.model, 1, None)
        check_parts(place.model)


def check_weights(place: Place, part: str, content: bytes) -> None:
    """Look at a model folder with another file of weights."""
    from ptdit_diffusers.pipelines.model_folders import check_folder

    (path,) = (place.model / part).glob("*.safetensors")
    with changed(place, path.relative_to(place.model).as_posix(), content), only(ValueError, OSError):
        check_folder(place.model)


def export(place: Place, change: tuple[str, bytes | dict[str, Any]]) -> None:
    """Export a model folder without pictures; the result is complete or not there."""
    from ptdit_diffusers.export.folder import ExportError, export

    output = place.folder / "work/out/exported"
    with changed(place, *change), only(ExportError):
        export(place.model, output)
    shutil.rmtree(output, ignore_errors=True)


# --- training data ---------------------------------------------------------------------------------------------------


def read_picture(place: Place, ending: str, content: bytes, frames: int) -> None:
    """Read a picture or clip as training does."""
    from ptdit_diffusers.training.data.media import UnreadableError, is_clip, read_frames

    path = place.write(f"x{ending}", content)
    with only(UnreadableError):
        is_clip(path)
        read_frames(path, frames)


def read_table(place: Place, name: str, text: str) -> None:
    """Find what a table names; nothing outside of the folder of the data is taken."""
    from ptdit_diffusers.training.data.buckets import bucket_sizes
    from ptdit_diffusers.training.data.find import find_items

    data = place.folder / "work/data"
    (data / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        with only(ValueError):
            found = find_items(str(data), "", "", 1, bucket_sizes(64, 32, 2.0)).items
            if outside := [item.path for item in found if not item.path.resolve().is_relative_to(data.resolve())]:
                raise Finding(f"trains on {outside[0]}")
    finally:
        (data / name).unlink()


def clean(place: Place, text: str) -> None:
    """Clean a caption."""
    from ptdit_diffusers.core.captions import clean_caption

    with only():
        clean_caption(text)


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """Inputs, what is done with them, and how many of a hundred inputs are of this kind."""

    inputs: st.SearchStrategy[tuple]
    use: Callable[..., None]
    share: int


PARTS = st.sampled_from(("transformer", "transformer", "vae", "text_encoder"))
TARGETS = {
    "safetensors": Target(st.tuples(st.just("x.safetensors"), files.SAFETENSORS, PARTS), convert, 22),
    "torch": Target(st.tuples(st.just("x.pt"), files.TORCH, PARTS), convert, 24),
    "shards": Target(
        st.tuples(st.just("x.index.json"), files.INDEXES.map(lambda text: text.encode("utf-8", "ignore")), PARTS),
        convert,
        3,
    ),
    "gguf": Target(st.tuples(files.GGUF), single_gguf, 6),
    "lora": Target(st.tuples(files.LORAS), load_lora, 14),
    "folder": Target(st.tuples(changes()), check_model, 6),
    "weights": Target(
        st.tuples(st.sampled_from(("transformer", "vae", "text_encoder")), files.SAFETENSORS), check_weights, 4
    ),
    "export": Target(st.tuples(changes()), export, 1),
    "picture": Target(
        st.tuples(st.sampled_from((".png", ".gif", ".jpg", ".webp", ".tiff")), files.PICTURES, st.integers(1, 5)),
        read_picture,
        12,
    ),
    "table": Target(st.tuples(st.sampled_from(("metadata.jsonl", "metadata.csv")), files.TABLES), read_table, 5),
    "caption": Target(
        st.tuples(st.text() | st.text("<a>&;/ht tp:.", max_size=200).map(lambda text: text * 20)), clean, 3
    ),
}


def try_inputs(name: str, place: Place, count: int, seed: int | None, note: Callable[[], None] = lambda: None) -> None:
    """Try inputs of one kind.

    Args:
        name: One of TARGETS.
        place: Where to.
        count: How many.
        seed: None takes the same inputs each time.
        note: Called before each input.

    Raises:
        Finding: One is answered wrongly; hypothesis has made it as small as it could.
    """
    import hypothesis

    target = TARGETS[name]
    before = place.snapshot()

    def each(values: tuple) -> None:
        note()
        target.use(place, *values)
        if (after := place.snapshot()) != before:
            raise Finding(f"files elsewhere: {sorted(before.items() ^ after.items())[:3]}")

    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    test = settings(hypothesis.given(target.inputs)(each))
    (test if seed is None else hypothesis.seed(seed)(test))()
    gc.collect()
