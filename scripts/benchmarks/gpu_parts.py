"""What `scripts.benchmarks.gpu` measures: each function returns the rows of one part, with random weights."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from ptdit_diffusers import AutoencoderKLOpenSoraPlan, PTDiTPipeline, PTDiTTransformer3DModel
from ptdit_diffusers.commands.loading import OFFLOADS, QUANTIZED, Plan, encode, load_rest
from scripts.benchmarks import lora_memory, speed
from scripts.benchmarks.official_files import T5_XXL, make_tokenizer
from scripts.benchmarks.timing import synchronize
from scripts.evaluation.records import read_record

TIMES = ("load_s", "step_s", "decode_s")
TINY_SPEED = ["--layers", "1", "--heads", "2", "--caption", "8", "--text", "3", "--repeats", "1"]
TINY_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_NETWORK = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "caption_channels": 32,
                "window_size": (1, 2, 2), "proxy_ratio": (1, 2, 2), "num_windows": 4, "sample_size": 8}  # fmt: skip
TINY_VAE = {"hidden_size": 8, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1, "norm_num_groups": 4}


def speeds(pixels: int, frames: int, compiled: bool, tiny: bool, device: str) -> list[dict[str, Any]]:
    """Return the rows of `scripts.benchmarks.speed` for one size of pictures or videos, with all models that fit."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "speed.json"
        words = [*(TINY_SPEED if tiny else []), *(["--compile"] if compiled else [])]
        words += ["--pixels", "32" if tiny else str(pixels), "--frames", str(frames), "--dtypes", "bfloat16"]
        speed.main([*words, "--device", device, "--out", str(out)])
        return read_record(out, {})["rows"]


def make_folder(folder: Path, tiny: bool, device: str) -> list[dict[str, Any]]:
    """Write a model folder of the official sizes in bf16, with weights that are sampled on the device."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        make_tokenizer(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
    config = T5Config(**(TINY_T5 if tiny else T5_XXL), feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    pipe = PTDiTPipeline(
        tokenizer,
        sampled(lambda: T5EncoderModel(config), device),
        sampled(lambda: AutoencoderKLOpenSoraPlan(**(TINY_VAE if tiny else {})), device),
        sampled(lambda: PTDiTTransformer3DModel(**(TINY_NETWORK if tiny else {})), device),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=1024),
    )
    start = time.monotonic()
    pipe.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return [{"gb": round(size / 1e9, 2), "write_s": round(time.monotonic() - start, 1)}]


@torch.no_grad()
def sampled(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """Return a model in bf16 with random weights with which numbers neither vanish nor explode."""
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float(name.endswith("weight")))
        else:
            weight.normal_(std=weight[0].numel() ** -0.5)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def options(device: str) -> tuple[str, ...]:
    """Return the ways to need less memory, as `ptdit generate` names them, that work on a device."""
    offloads = tuple(f"--offload {name}" for name in OFFLOADS)
    quantized = tuple(f"--quantize {name}" for name in QUANTIZED)
    both = ("--offload group --quantize fp8",)
    if device.startswith("cuda"):
        return ("no option", *offloads, *quantized, *both)
    return ("no option", "--offload group", "--quantize fp8")


def official(option: str, folder: Path, tiny: bool, device: str) -> list[dict[str, Any]]:
    """Return peak memory and times of `ptdit generate` at 1024 x 1024 with one of the options."""
    words = option.split()
    chosen = dict(zip(words[::2], words[1::2], strict=False)) if option != "no option" else {}
    plan = Plan(folder, device, "bf16", chosen.get("--offload"), chosen.get("--quantize"))
    marks, size, start = [], 64 if tiny else 1024, time.monotonic()

    def note(*_: Any) -> dict[str, Any]:
        synchronize(device)
        marks.append(time.monotonic())
        return {}

    texts = encode(plan, "a red circle above a blue square", "", True)
    pipe = load_rest(plan)
    loaded = time.monotonic()
    steps = 2 if tiny else 4
    pipe(**texts, height=size, width=size, num_inference_steps=steps, callback_on_step_end=note, output_type="pt")
    synchronize(device)
    end, gpu = time.monotonic(), device.startswith("cuda")
    times = loaded - start, (marks[-1] - marks[0]) / (len(marks) - 1), end - marks[-1]
    return [
        {
            "option": option,
            "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if gpu else None,
            "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
            **{name: round(value, 2) for name, value in zip(TIMES, times, strict=True)},
        }
    ]


def lora(preset: str, tiny: bool) -> list[dict[str, Any]]:
    """Return the row of `scripts.benchmarks.lora_memory` for a preset at its own size; the second step is warm."""
    pixels = "128" if tiny else "512" if preset == "12gb" else "1024"
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "lora.json"
        words = ["--preset", preset, "--resolution", pixels, "--steps", "1" if tiny else "3", "--output", str(out)]
        further = ["--layers", "1", "--accumulation", "1"] if tiny else ["--accumulation", "1"]
        if code := lora_memory.main([*words, *further]):
            raise SystemExit(code)  # it said why
        return read_record(out, [])


def gpu_tests() -> list[dict[str, Any]]:
    """Run the tests that need a GPU; return what pytest counted."""
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "--no-header"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(json.dumps(done.stdout[-2000:]))
    return [{"said": done.stdout.strip().splitlines()[-1]}]
