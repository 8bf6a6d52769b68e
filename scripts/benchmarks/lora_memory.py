"""Peak memory and time of LoRA steps at the official size, with random weights, through the real training script.

    python -m scripts.benchmarks.lora_memory --preset 12gb --resolution 512 --output docs/lora/memory.json

A model folder with random weights in bf16 and a cache with one random sample are made in a temporary folder; then
`lora.train` runs with the preset. Weights and pictures are random, so the loss means nothing; memory and time do.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora.base import BaseModel
from lora.cache import Cache, text_key
from lora.records import memory_gib
from lora.train import main as train
from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.record import hardware, versions

TEXT_TOKENS, TEXT_WIDTH = 60, 4096
SCALING = VAEParameters.scaling_factor


def random_base(folder: Path, layers: int) -> BaseModel:
    """A model folder with the official transformer's sizes; of the other parts only what training reads."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = PTDiTTransformer3DModel(num_layers=layers)
    torch.set_default_dtype(torch.float32)
    for block in transformer.transformer_blocks:  # zero at the beginning, which would keep gradients from its layers
        torch.nn.init.normal_(block.linear_1_visual.weight, std=0.02)
        torch.nn.init.normal_(block.linear_2.weight, std=0.02)
    transformer.save_pretrained(folder / "transformer")
    del transformer
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=1024).save_pretrained(
        folder / "scheduler"
    )
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"scaling_factor": SCALING}), encoding="utf-8")
    return BaseModel(str(folder))


def random_cache(folder: Path, base: BaseModel, resolution: int) -> None:
    """One sample of that many pixels a side, and the empty caption."""
    cache, side = Cache(folder, base), resolution // 8
    latents = {"mean": torch.randn(4, 1, side, side), "std": torch.full((4, 1, side, side), 0.1)}
    cache.write("latents", iter([("sample", latents)]))
    texts = {caption: {"embeds": torch.randn(TEXT_TOKENS, TEXT_WIDTH)} for caption in ("", "caption")}
    cache.write("text", ((text_key(caption), text) for caption, text in texts.items()))
    cache.manifest["samples"] = [
        {
            "latents": "sample",
            "mirrored": "",
            "text": text_key("caption"),
            "bucket": (1, resolution, resolution),
            "prior": False,
        }
    ]
    replace_json(cache.path, cache.manifest)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.lora_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="12gb", help="name of a file in lora/configs (default: 12gb)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps (default: 1)")
    parser.add_argument("--layers", type=int, default=28, help="blocks (default: 28, the official number)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a line of measurements is added to it")
    args, further = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = random_base(folder / "base", args.layers)
        random_cache(folder / "cache", base, args.resolution)
        before = memory_gib(torch.device("cpu"))
        code = train(
            ["--config", f"lora/configs/{args.preset}.yaml", "--base", str(folder / "base"), "--log-every", "1"]
            + ["--cache-dir", str(folder / "cache"), "--output-dir", str(folder / "run")]
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
