"""Make files of the official sizes, names and containers with random weights, to measure memory and time with.

The numbers are random, so pictures made with them are noise. The tokenizer is a stand-in of letters for T5's word
pieces: python -m scripts.benchmarks.official_files FOLDER (16 GB).
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scripts.evaluation.options import make_parser

SHAPES = Path(__file__).resolve().parents[2] / "tests" / "golden"
SHARD_VALUES = 500_000_000  # of the text encoder, 1 GB in fp16
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def random_weight(name: str, shape: list[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a weight with which numbers neither vanish nor explode: norms 1, biases 0, the rest by fan-in."""
    if len(shape) == 1:
        return (torch.ones if name.endswith("weight") else torch.zeros)(shape, dtype=dtype)
    scale = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.float32).normal_(std=scale, generator=generator).to(dtype)


def random_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Return all weights of a list of names and shapes, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_weight(name, shape, generator, torch.float32) for name, shape in shapes.items()}


def make_transformer(path: Path) -> None:
    """Write the released .pt: flat, fp32, without the position buffer."""
    torch.save(random_weights(json.loads((SHAPES / "official_transformer_shapes.json").read_text()), 0), path)


def make_vae(path: Path) -> None:
    """Write the released checkpoint.ckpt: averaged weights of a training run, fp32, beside the rest of the run."""
    weights = random_weights(json.loads((SHAPES / "official_vae_shapes.json").read_text()), 1)
    torch.save(
        {"ema_state_dict": {f"module.{name}": value for name, value in weights.items()}, "current_step": 1}, path
    )


def make_text_encoder(folder: Path) -> None:
    """Write T5-XXL v1.1's encoder as transformers shards it, in fp16."""
    config = T5Config(**T5_XXL, feed_forward_proj="gated-gelu", is_encoder_decoder=False, dtype=torch.float16)
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in T5EncoderModel(config).state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
    shards: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if shards[-1] and sum(math.prod(shapes[each]) for each in shards[-1]) + math.prod(shape) > SHARD_VALUES:
            shards.append([])
        shards[-1].append(name)
    generator, index = torch.Generator().manual_seed(2), {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: random_weight(name, shapes[name], generator, torch.float16) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of T5's kind (unigram, </s> = 1, padding 0) whose pieces are single letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    ).save_pretrained(folder)


def make_all(folder: Path) -> None:
    """Write transformer.pt, checkpoint.ckpt, and t5/text_encoder with t5/tokenizer."""
    folder.mkdir(parents=True)
    (folder / "t5").mkdir()
    make_tokenizer(folder / "t5" / "tokenizer")
    make_vae(folder / "checkpoint.ckpt")
    make_transformer(folder / "transformer.pt")
    make_text_encoder(folder / "t5" / "text_encoder")


def main(arguments: list[str] | None = None) -> None:
    """Make the files in a new folder."""
    parser = make_parser("scripts.benchmarks.official_files", __doc__)
    parser.add_argument("folder", type=Path, help="new folder")
    make_all(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
