"""The benchmark: its cost formula against counted products, and a run on tiny sizes (what it writes, not how fast)."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from scripts.benchmark import main
from scripts.benchmarking.cost import Size, attention_macs, attention_ratio, total_macs

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
