"""diffusers' caches skip the work that they promise, through the pipeline, with the identifiers that the docs give."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from ptdit_diffusers import PTDiTPipeline
from scripts.benchmarks import caches as measure_caches

STEPS = 8
DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def pipe(tiny_model_folder):
    pipe = PTDiTPipeline.from_pretrained(str(tiny_model_folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: PTDiTPipeline, counted: torch.nn.Module) -> tuple[Tensor, list[int]]:
    """Latents of one run, and the batch of each call of the counted layer."""
    batches = []
    handle = counted.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    latents = pipe(
        "a red star", generator=torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="latent"
    ).images
    handle.remove()
    return latents, batches


def timestep(pipe: PTDiTPipeline):
    return lambda: float(pipe.current_timestep)


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda pipe: MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "sea": lambda pipe: SeaCacheConfig(
        threshold=10.0, raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"].unbind(0))
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=measure_caches.ATTENTION),
    "taylor lite": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True),
    "pab": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        current_timestep_callback=timestep(pipe),
    ),
    "faster": lambda pipe: FasterCacheConfig(
        attention_weight_callback=lambda _: 0.3, current_timestep_callback=timestep(pipe)
    ),
}


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_a_cache_skips_steps_and_leaves_nothing_behind(pipe, name):
    counted = pipe.transformer.transformer_blocks[1].attn3.to_q
    plain, calls = generate(pipe, counted)
    assert calls == [2] * STEPS
    pipe.transformer.enable_cache(CACHES[name](pipe))
    cached, calls = generate(pipe, counted)
    again, _ = generate(pipe, counted)
    pipe.transformer.disable_cache()
    assert sum(calls) < 2 * STEPS - 2
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert torch.equal(again, cached)
    after, calls = generate(pipe, counted)
    assert calls == [2] * STEPS and torch.equal(after, plain)


def hooked(transformer: torch.nn.Module, hook: str) -> list[str]:
    named = [(name, layer) for name, layer in transformer.named_modules() if hasattr(layer, "_diffusers_hook")]
    return [name for name, layer in named if layer._diffusers_hook.get_hook(hook) is not None]


def test_taylorseer_needs_our_identifiers_because_its_own_miss_numbered_names(pipe):
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    assert hooked(pipe.transformer, "taylorseer_cache") == []
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_identifiers=measure_caches.ATTENTION))
    names = hooked(pipe.transformer, "taylorseer_cache")
    pipe.transformer.disable_cache()
    each = {"proxy_attn1", "pvisual_attn2", "attn1", "attn2", "attn3"}
    assert sorted(names) == sorted(f"transformer_blocks.{block}.{part}" for block in range(2) for part in each)


def test_pab_and_fastercache_find_the_attentions_by_themselves(pipe):
    for name, hook, parts in (
        ("pab", "pyramid_attention_broadcast", 5),
        ("faster", "faster_cache_block", 3),
    ):
        pipe.transformer.enable_cache(CACHES[name](pipe))
        assert len(hooked(pipe.transformer, hook)) == 2 * parts
        pipe.transformer.disable_cache()


def test_the_measurement_names_a_speed_and_a_distance_for_every_cache(tiny_model_folder):
    result = measure_caches.measure(str(tiny_model_folder), 6, 2.0, ["a red star"])
    assert len(result["caches"]) == 7 and len(result["mag_ratios"]) == 6
    for row in result["caches"].values():
        assert row["speed"] > 0 and row["psnr_db"] > 0
    assert measure_caches.table(result["caches"]).count("\n") == 9


def test_the_documented_table_is_the_recorded_one():
    recorded = json.loads((DOCS / "benchmarks" / "caches.json").read_text(encoding="utf-8"))
    assert measure_caches.table(recorded["caches"]) in (DOCS / "caching.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--prompts", "9"], "nearest: 8"), (["--steps", "2"], "nearest: 4")]
)
def test_bad_settings_are_refused_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit):
        measure_caches.main(arguments)
    assert message in capsys.readouterr().err
