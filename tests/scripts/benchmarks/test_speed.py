"""The benchmark: its cost formula against counted products, and a run on tiny sizes (what it writes, not how fast)."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ptdit_diffusers.core.cost import Size, attention_macs, decode_bytes, forward_bytes, total_macs
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from scripts.benchmarks import longest_video
from scripts.benchmarks.cost import attention_ratio
from scripts.benchmarks.memory import PeakMemory
from scripts.benchmarks.models import Job, prepare
from scripts.benchmarks.speed import growth, main, panels_of

# (latent frames, pixels) -> tokens per window and proxy; 24 frames as in the paper's video
PAPER = {(1, 256): (1, 2, 2), (1, 512): (1, 4, 4), (1, 1024): (1, 8, 8), (1, 2048): (1, 16, 16), (24, 512): (4, 4, 4)}


@pytest.mark.parametrize(("frames", "pixels"), PAPER)
@torch.no_grad()
def test_counted_products_of_the_official_model_agree_with_the_formula_within_one_percent(frames, pixels):
    window = PAPER[frames, pixels]
    with torch.device("meta"):
        transformer = PTDiTTransformer3DModel(num_layers=2, window_size=window, proxy_ratio=window).eval()
        latents = torch.empty(1, 4, frames, pixels // 8, pixels // 8)
        text, timestep = torch.empty(1, 24, 4096), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            transformer(latents, text, timestep)
    size = Size((frames, pixels // 16, pixels // 16), window, window, layers=2)
    assert counter.get_total_flops() / 2 == pytest.approx(total_macs(size), rel=0.01)


@pytest.mark.parametrize(
    ("pixels", "per_window", "percent"), [(256, 4, 34.4), (512, 16, 9.8), (1024, 64, 4.7), (2048, 256, 3.5)]
)
def test_attention_against_global_attention_reproduces_the_paper(pixels, per_window, percent):
    tokens, window = (pixels // 16) ** 2, PAPER[1, pixels]
    assert round(100 * attention_ratio(tokens, per_window), 1) == percent
    size = Size((1, pixels // 16, pixels // 16), window, window, layers=1, text=0)
    unshifted = 1 / per_window**2 + 1 / per_window + per_window / tokens  # our shifted windows are cheaper at borders
    counted = attention_macs(size) / (2 * tokens**2 * size.dim)
    assert unshifted < counted <= attention_ratio(tokens, per_window)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "models"), [(1, {"bare", "ptdit", "fused", "ptdit-864", "pixart", "dit"}),
                                                (2, {"bare", "ptdit", "fused", "wan"})])  # fmt: skip
def test_a_tiny_run_writes_every_model_and_its_plot(tmp_path, frames, models):
    out = tmp_path / "tiny.json"
    sizes = ["--pixels", "32", "--layers", "1", "--heads", "2", "--caption", "8", "--text", "3", "--repeats", "2"]
    main([*sizes, "--frames", str(frames), "--device", "cpu", "--savings", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {row["model"] for row in record["rows"]} == models
    for row in record["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["gmacs"] >= 0 and row["peak_mib"] >= 0
    assert len(record["savings"][0]["products"]) == 5
    main(["--plot", str(out)])
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_one_run_over_lengths_says_how_time_and_memory_grow(tmp_path, capsys):
    out = tmp_path / "lengths.json"
    sizes = ["--pixels", "64", "--layers", "1", "--heads", "2", "--caption", "8", "--text", "3", "--repeats", "1"]
    main([*sizes, "--frames", "1", "8", "16", "--models", "ptdit", "wan", "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["model"], row["frames"]) for row in record["growth"]] == [("ptdit", [8, 16]), ("wan", [8, 16])]
    assert record["growth"][0]["memory"] == pytest.approx(1, abs=0.15)
    ((title, rows),) = panels_of(record["rows"])
    assert title == "video, float32" and {row["frames"] for row in rows} == {1, 8, 16}
    main(["--plot", str(out)])
    assert out.with_suffix(".png").stat().st_size > 1000


def test_growth_is_the_exponent_of_the_tokens():
    rows = [
        {"model": "m", "dtype": "d", "pixels": 64, "frames": n, "median_s": n**2, "peak_mib": 3 * n, "gmacs": None}
        for n in (4, 2, 8)
    ]
    (line,) = growth(rows)
    assert (line["seconds"], line["memory"], line["frames"]) == (2, 1, [4, 8]) and "macs" not in line


@pytest.mark.parametrize("heads, frames, batch", [(4, 24, 1), (4, 24, 2), (6, 16, 1)])
@torch.inference_mode()
def test_the_memory_formula_of_a_forward_holds_for_counted_tensors(heads, frames, batch):
    job = Job(frames, 64, layers=1, batch=batch, text=24, heads=heads, caption=64)
    _, function = prepare("ptdit", job, torch.float32, "cpu", compiled=False)
    with PeakMemory() as memory:
        function()
    tokens = batch * frames * 16
    assert 0.85 <= memory.peak / forward_bytes(tokens, heads * 72, 4) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("tile, frames", [(64, 9), (64, 17), (128, 9)])
@torch.inference_mode()
def test_the_memory_formula_of_decoding_holds_for_counted_tensors(tile, frames):
    vae = AutoencoderKLOpenSoraPlan(hidden_size=8, norm_num_groups=4).eval()
    vae.enable_tiling(tile, frames)
    latents = torch.randn(1, 4, 9, tile // 8, tile // 8)
    with PeakMemory() as memory:
        vae.decode(latents)
    result = 2 * 3 * 33 * tile**2 * 4  # the whole video, in pieces and joined
    assert 0.8 <= (memory.peak - result) / decode_bytes(tile, frames, 4, hidden_size=8) <= 1.0


def test_the_longest_video_fits_and_one_frame_more_does_not(capsys):
    for memory in (8, 24):
        frames, tile = longest_video.longest(memory, 512)
        budget = longest_video.FREE * memory * 2**30
        assert longest_video.needed(frames, 512, tile) <= budget
        assert all(longest_video.needed(frames + 1, 512, each) > budget for each in longest_video.TILES)
    assert longest_video.longest(3, 512)[0] == 0
    longest_video.main(["--memory", "8", "--pixels", "512"])
    assert "computed" in capsys.readouterr().out
