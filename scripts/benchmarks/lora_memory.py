"""Peak memory and time of LoRA steps at the official size, with random weights, through the real training script.

    python -m scripts.benchmarks.lora_memory --preset 12gb --resolution 512 --output docs/lora/memory.json

A model folder is made in a temporary folder: the official transformer with random weights in bf16, and a tiny VAE and
text encoder of the official shapes. Then `lora.train` runs with the preset on one random picture. The loss means
nothing; memory and time do, since the VAE and the text encoder are gone before the transformer is loaded.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lora.train import main as train
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.record import hardware, memory_gib, versions

TEXT_TOKENS = 60


def write_random_base(folder: Path, layers: int) -> None:
    """Write a model folder with the official transformer's sizes and tiny other components."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = PTDiTTransformer3DModel(num_layers=layers)
    torch.set_default_dtype(torch.float32)
    for block in transformer.transformer_blocks:  # zero at the beginning, which would keep gradients from its layers
        torch.nn.init.normal_(block.linear_1_visual.weight, std=0.02)
        torch.nn.init.normal_(block.linear_2.weight, std=0.02)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    width = transformer.config.caption_channels
    text_encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    vae = AutoencoderKLOpenSoraPlan(hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=1024)
    PTDiTPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def write_random_picture(folder: Path, resolution: int) -> None:
    """Write one picture of that many pixels a side, and its caption of TEXT_TOKENS words."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    (folder / "picture.txt").write_text("word " * TEXT_TOKENS, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.lora_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="12gb", help="preset of the LoRA training (default: 12gb)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default: 1)")
    parser.add_argument("--layers", type=int, default=28, help="blocks (default: 28, the official number)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a line of measurements is added to it")
    args, further = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_random_base(folder / "base", args.layers)
        write_random_picture(folder / "data", args.resolution)
        before = memory_gib(torch.device("cpu"))
        code = train(
            ["--config", args.preset, "--base", str(folder / "base"), "--log-every", "1"]
            + ["--data", str(folder / "data"), "--output-dir", str(folder / "run")]
            + ["--resolution", str(args.resolution)]
            + ["--max-steps", str(args.steps), "--warmup", "0", "--checkpoint-every", "0", *further]
        )
        if code:
            return code
        log = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        trained = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))["parameters"]
        size = (folder / "run" / "lora" / "pytorch_lora_weights.safetensors").stat().st_size
    last = json.loads(log[-1])
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": args.preset,
        "options": further,
        "resolution": args.resolution,
        "layers": args.layers,
        "steps": args.steps,
        "peak_memory_gib": last["memory_gib"],
        "of_it_by_making_random_weights_gib": before,
        "seconds_per_step": round(last["seconds"] / args.steps, 2),
        "trained_values": trained,
        "lora_file_mb": round(size / 1e6, 1),
        "loss_is_finite": last["loss"] == last["loss"],
        "hardware": hardware(),
        "versions": versions(),
    }
    earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_json(args.output, [*earlier, found])
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
