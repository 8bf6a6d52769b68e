"""Strategies for files as a stranger could send them: valid ones, valid ones with changes, and free inventions."""

import io
import json
import struct
import zipfile
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image

from ptdit_diffusers.core.checkpoint_names import NESTINGS, PREFIXES

ODD_NAMES = (
    "",
    "\x1b]0;title\x07\x1b[2J\r",
    "__metadata__",
    "ptdit_config",
    "../outside",
    "/etc/outside",
    "pos_embed.pos_embed",
    "transformer_blocks.99999999.attn1.to_q.weight",
    "encoder.block." + "9" * 5000,
    "module." * 40 + "a",
    "a" * 3000,
)
NUMBERS = st.sampled_from((-1, 0, 1, 2, 3, 8, 10**5, 2**31, 2**40, 2**63, 10**30)) | st.integers(0, 40)
ODD_JSON = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from((0.5, -1.0, 1e30, float("nan"), "", "x", "1", "\x1b[2J", "../x", "([a-z0-9_.]+)+!"))
    | st.text(max_size=8)
    | st.lists(NUMBERS, max_size=4)
    | st.dictionaries(st.text(max_size=4), NUMBERS, max_size=3)
)
ODD_TEXTS = st.sampled_from(
    ("[" * 100_000, '{"a":' * 50_000, "", "[]", "{}", "null", "\ufeff{}", '{"a": 1', "nan", "\0")
)
EDITS = st.lists(  # place as a share of the file, bytes removed there, bytes put there
    st.tuples(st.floats(0, 1), st.sampled_from((0, 0, 1, 4, 1000)), st.binary(max_size=4)), min_size=1, max_size=4
)


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Return bytes with changes in some places."""
    for share, removed, put in edits:
        place = int(share * len(data))
        data = data[:place] + put + data[place + removed :]
    return data


def damaged(files: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Files as they are, and with changes in some places."""
    return files | st.builds(edited, files, EDITS)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@cache
def real_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a small transformer."""
    from ptdit_diffusers import PTDiTTransformer3DModel

    with torch.device("meta"):
        model = PTDiTTransformer3DModel(2, 24, num_layers=1, caption_channels=32, use_additional_conditions=False)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def safetensors_file(entries: dict[str, Any], length: int | None = None, metadata: Any = None) -> bytes:
    """Return a safetensors file of these entries of its header; those that are a shape become float16 zeros."""
    header, place = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, entry in entries.items():
        if isinstance(entry, tuple):
            size = 2
            for each in entry:
                size *= each
            entry = {"dtype": "F16", "shape": list(entry), "data_offsets": [place, place + size]}
            place += size
        header[name] = entry
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(place)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "X", None, 4)),
        "shape": st.lists(NUMBERS, max_size=5) | ODD_JSON,
        "data_offsets": st.lists(NUMBERS, max_size=3) | st.none(),
    }
)
SMALL_SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
NAMES = st.sampled_from(ODD_NAMES) | st.text(max_size=8) | st.deferred(lambda: st.sampled_from(sorted(real_shapes())))


@st.composite
def near_models(draw: st.DrawFn) -> dict[str, Any]:
    """The weights of a real transformer with some left out, renamed or of another shape."""
    entries: dict[str, Any] = dict(real_shapes())
    for name in draw(st.lists(st.sampled_from(sorted(entries)), max_size=3)):
        entries.pop(name, None)
    prefix = draw(st.sampled_from(("", "", *PREFIXES)))
    entries = {prefix + name: shape for name, shape in entries.items()}
    return entries | draw(st.dictionaries(NAMES, SMALL_SHAPES | ENTRIES, max_size=3))


SAFETENSORS = damaged(
    st.builds(
        safetensors_file,
        near_models() | st.dictionaries(NAMES, SMALL_SHAPES | ENTRIES | ODD_JSON, max_size=5),
        st.none() | NUMBERS.map(lambda number: number % 2**64),
        st.none()
        | st.dictionaries(st.sampled_from(("ptdit_config", "config", "format")), ODD_JSON | st.text(), max_size=2),
    )
)


def odd_tensor(kind: str) -> Any:
    """Return a tensor of a kind that no saved model has."""
    plain = torch.zeros(2, 3)
    return {
        "plain": lambda: plain,
        "expanded": lambda: torch.zeros(1).expand(10**9, 4),
        "transposed": lambda: plain.T,
        "sparse": lambda: plain.to_sparse(),
        "meta": lambda: plain.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([plain[0], plain[1, :2]]),
        "complex": lambda: plain.to(torch.complex64),
        "empty": lambda: torch.zeros(0, 7),
        "config": lambda: torch.tensor(list(b'{"num_layers": 100000000}'), dtype=torch.uint8),
        "scalar": lambda: torch.tensor(float("nan")),
    }[kind]()


KEYS = st.sampled_from(NESTINGS) | NAMES | st.integers(0, 3)
TENSORS = st.sampled_from(
    ("plain", "expanded", "transposed", "sparse", "meta", "nested", "complex", "empty", "config", "scalar")
).map(odd_tensor)
CONTENTS = st.recursive(
    TENSORS | st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=8,
)


def torch_file(content: Any, old: bool) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


OPERATIONS = (
    "} ] ) ( t s u a e 0 1 2 N . \x81 b R q\0 q\1 h\0 h\1 K\1 K\2 J\0\0\0\x7f \x8a\5\0\0\0\0\2 X\1\0\0\0a "
    "X\3\0\0\0ema G\0\0\0\0\0\0\0\0 \x86 \x85 \x88 Q ctorch\nFloatStorage\n "
    "ctorch._utils\n_rebuild_tensor_v2\n ccollections\n"
    "OrderedDict\n cargparse\nNamespace\n c__builtin__\nbytearray\n cos\nsystem\n ctorch\nSize\n \x8d\0\0\0\0\0\1\0\0a"
).split(" ")


def zip_of(pickled: bytes, packed: bool, name: str) -> bytes:
    """Return a torch file around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr(f"a/{name}", pickled)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(24))
    return file.getvalue()


PICKLES = st.lists(st.sampled_from(OPERATIONS), max_size=25).map(
    lambda operations: b"\x80\2" + "".join(operations).encode("latin-1") + b"."
)
TORCH = (
    damaged(st.builds(torch_file, CONTENTS, st.booleans()))
    | st.builds(zip_of, PICKLES, st.booleans(), st.sampled_from(("data.pkl", "data.pkl", "x.pkl", "../data.pkl")))
    | PICKLES
)
INDEXES = ODD_TEXTS | st.dictionaries(
    st.sampled_from(("weight_map", "metadata")),
    ODD_JSON | st.dictionaries(NAMES, NAMES | ODD_JSON, max_size=3),
    max_size=2,
).map(json.dumps)


def gguf_file(tensors: int, fields: int, body: list[bytes]) -> bytes:
    """Return a GGUF header that claims these counts, and what follows."""
    counts = (number % 2**64 for number in (tensors, fields))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(body) + bytes(64)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode("latin-1")


WORDS = st.sampled_from(
    ("general.architecture", "ptdit", "ptdit.config", '{"num_layers": 100000000}', "[" * 5000, "a")
)
PIECES = (
    WORDS.map(_text)
    | NUMBERS.map(lambda number: struct.pack("<Q", number % 2**64))
    | st.integers(0, 13).map(lambda number: struct.pack("<I", number))
    | st.builds(lambda name, value: _text(name) + struct.pack("<I", 8) + _text(value), WORDS, WORDS)
)
GGUF = st.builds(gguf_file, NUMBERS, NUMBERS, st.lists(PIECES, max_size=8))

# --- LoRA ------------------------------------------------------------------------------------------------------------

MODULES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0", "proj_out", "pos_embed.proj")
LORA_PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "base_model.model.",
    "",
    "lora_unet_",
    "lycoris_",
    "text_encoder.",
)
ENDINGS = (
    ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.default.weight",
    ".diff", ".lora_magnitude_vector", ".dora_scale", ".lora_B.bias", ".lora_A", "",
)  # fmt: skip
LORA_NAMES = st.builds(
    lambda prefix, module, ending: prefix + (module.replace(".", "_") if prefix.endswith("_") else module) + ending,
    st.sampled_from(LORA_PREFIXES),
    st.sampled_from((*MODULES, "transformer_blocks.99999999.attn1.to_q", "transformer_blocks." + "9" * 5000 + ".ff")),
    st.sampled_from(ENDINGS),
)
SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "bias",
    "init_lora_weights",
)
METADATA = ODD_TEXTS | st.dictionaries(
    st.sampled_from(SETTINGS).map("transformer.".__add__) | st.text(max_size=5), ODD_JSON, max_size=4
).map(json.dumps)


@st.composite
def near_loras(draw: st.DrawFn) -> dict[str, Any]:
    """Pairs for layers that a small transformer has, and other weights beside them."""
    rank = draw(st.integers(0, 3))
    pairs: dict[str, Any] = {}
    for module in draw(st.lists(st.sampled_from(MODULES[:2]), max_size=2)):
        pairs |= {f"transformer.{module}.lora_A.weight": (rank, 48), f"transformer.{module}.lora_B.weight": (48, rank)}
    return pairs | draw(st.dictionaries(LORA_NAMES, SMALL_SHAPES, max_size=3))


LORAS = damaged(
    st.builds(
        lambda entries, text: safetensors_file(
            entries, metadata={"format": "pt"} | ({} if text is None else {"lora_adapter_metadata": text})
        ),
        near_loras() | st.dictionaries(NAMES | LORA_NAMES, SMALL_SHAPES | ENTRIES, max_size=4),
        st.none() | METADATA,
    )
)

# --- pictures and tables ---------------------------------------------------------------------------------------------


@cache
def picture(kind: str) -> bytes:
    """Return a small picture or animation; EPS is what Pillow would hand to Ghostscript."""
    if kind == "EPS":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    file = io.BytesIO()
    image = Image.effect_noise((9, 7), 50).convert("RGB")
    more = {"save_all": True, "append_images": [image.rotate(180)] * 4} if kind in ("GIF", "WEBP", "PNG") else {}
    image.save(file, kind, **more)
    return file.getvalue()


PICTURES = damaged(st.sampled_from(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "EPS")).map(picture))
ROWS = st.dictionaries(
    st.sampled_from(("file_name", "file", "text", "caption", "image", "prompt")),
    st.sampled_from(("good.png", "../outside.png", "/etc/passwd", "good.png\0", "")) | ODD_JSON,
    max_size=4,
)
TABLES = st.lists(ROWS.map(json.dumps) | ODD_TEXTS | st.text(max_size=20), max_size=3).map("\n".join)
