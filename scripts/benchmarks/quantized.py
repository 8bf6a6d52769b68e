"""Size of quantized copies and how near their outputs are to bf16's: python -m scripts.benchmarks.quantized FOLDER

For the embedded model: pictures of the same seeds. For layers of the official width with random weights (2 blocks of
the transformer, 1 of T5-XXL): what each network computes from the same input. The row "fp32" has the same weights as
bf16 and only computes in fp32: what is near that is as good as bf16. Rows are merged into
docs/benchmarks/quantized.json; `--rows shapes wide-q8_0` makes only those whose names contain one of the words.
"""

import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import GGUFQuantizationConfig
from transformers import T5Config, T5EncoderModel

from ptdit_diffusers import PTDiTPipeline, PTDiTTransformer3DModel
from ptdit_diffusers.conversion.quantize import gguf_name, quantize
from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.core.small_formats import FORMATS, GGUF_FORMATS
from scripts.benchmarks.official_files import T5_XXL
from scripts.benchmarks.psnr import psnr
from scripts.evaluation.generate import generate
from scripts.evaluation.options import make_parser
from scripts.evaluation.records import BENCHMARKS, read_record, write_record

RESULTS = BENCHMARKS / "quantized.json"
PROMPTS = (
    "a red circle above a blue square",
    "a yellow star inside a black ring",
    "two green triangles, white background",
    "a large purple heart to the left of a small orange cross",
)
STEPS = 30
VOCABULARY = 1000  # of the layers of official width; its table is never quantized
BF16 = torch.bfloat16


def load(folder: Path, original: Path, form: str | None) -> PTDiTPipeline:
    """Return a pipeline with the quantized parts of a folder, computing in bf16."""
    if form == "fp32":
        return PTDiTPipeline.from_pretrained(original, dtype=torch.float32)
    if form not in GGUF_FORMATS:
        return PTDiTPipeline.from_pretrained(folder, dtype=BF16)
    transformer = PTDiTTransformer3DModel.from_single_file(
        str(folder / gguf_name("transformer", form)),
        config=str(original),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=BF16),
        dtype=BF16,
    )
    config = T5Config.from_pretrained(original / "text_encoder")
    file = gguf_name("text_encoder", form)
    text_encoder = T5EncoderModel.from_pretrained(folder, gguf_file=file, config=config, dtype=BF16)
    return PTDiTPipeline.from_pretrained(original, transformer=transformer, text_encoder=text_encoder, dtype=BF16)


@torch.no_grad()
def pictures(pipe: PTDiTPipeline) -> dict[str, np.ndarray]:
    """Return pictures of the embedded model, values 0 to 1."""
    pipe.set_progress_bar_config(disable=True)
    return {"pictures": np.stack(list(generate(pipe, PROMPTS, num_inference_steps=STEPS)))}


@torch.no_grad()
def outputs(pipe: PTDiTPipeline) -> dict[str, np.ndarray]:
    """Return what transformer and T5 compute from fixed random input, 256 x 256 pixels and 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if pipe.vae.dtype == torch.float32 else BF16
    latents, text = (
        torch.randn(shape, generator=generator).to(BF16).to(dtype) for shape in ((1, 4, 1, 32, 32), (1, 20, 4096))
    )
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=generator)
    return {
        "transformer": pipe.transformer(latents, text, torch.tensor([500.0])).sample.float().numpy(),
        "text_encoder": pipe.text_encoder(ids)[0].float().numpy(),
    }


def make_official_width(folder: Path) -> None:
    """Save a pipeline of the official widths with few layers and random weights, bf16."""
    torch.manual_seed(0)
    transformer = PTDiTTransformer3DModel(num_layers=2).to(BF16)
    for parameter in transformer.parameters():
        if parameter.abs().max() == 0:  # layers that begin at zero would hide their error
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    config = T5Config(
        **T5_XXL | {"num_layers": 1, "vocab_size": VOCABULARY},
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    small = PTDiTPipeline.from_pretrained("shapes-128", dtype=BF16)
    PTDiTPipeline(small.tokenizer, T5EncoderModel(config).to(BF16), small.vae, transformer, small.scheduler) \
        .save_pretrained(folder)  # fmt: skip


def measure(name: str, model: Path, compute: Callable, patterns: list[str]) -> None:
    """Measure the rows of one model whose names contain one of the patterns."""
    forms = [form for form in ("fp32", *FORMATS) if any(each in f"{model.name}-{form}" for each in patterns)]
    if not forms:
        return
    expected = compute(load(model, model, None))
    for form in forms:
        copy, lines = model.with_name(f"{model.name}-{form}"), []
        if form != "fp32":
            shutil.rmtree(copy, ignore_errors=True)
            quantize(model, copy, form, report=lines.append)
        found = compute(load(copy, model, form))
        shutil.rmtree(copy, ignore_errors=True)
        near = {what: round(psnr(found[what], values, float(np.ptp(values))), 1) for what, values in expected.items()}
        rows = read_record(RESULTS, {"rows": []})["rows"]
        rows = [row for row in rows if (row["model"], row["format"]) != (name, form)]
        rows.append({"model": name, "format": form, "psnr_db": near, "sizes": lines})
        rows.sort(key=lambda row: (row["model"], ("fp32", *FORMATS).index(row["format"])))
        content = {"date": date.today().isoformat(), "torch": torch.__version__, "device": "cpu", "rows": rows}
        write_record(RESULTS, content)
        sys.stdout.write(f"{name}, {form}: {near} {lines}\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Measure both models."""
    parser = make_parser("scripts.benchmarks.quantized", __doc__)
    parser.add_argument("folder", type=Path, help="for the quantized copies, 6 GB")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of shapes-FORMAT or wide-FORMAT (default: all)")
    args = parser.parse_args(arguments)
    place, patterns = args.folder.resolve(), args.rows
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "shapes").is_dir():
        PTDiTPipeline.from_pretrained(embedded_model_path("shapes-128"), dtype=BF16).save_pretrained(place / "shapes")
    measure("shapes-128", place / "shapes", pictures, patterns)
    if not (place / "wide").is_dir() and any("shapes" not in each for each in patterns):
        make_official_width(place / "wide")
    measure("official width, 2 blocks and 1 of T5-XXL, random", place / "wide", outputs, patterns)


if __name__ == "__main__":
    main()
