"""Weights with few bits."""

import zlib

import pytest
import torch
from safetensors.torch import load_file, save

from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from scripts.embedded_models.shorten import main, shortened


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [3, 6])
def test_numbers_are_rounded_to_so_many_bits_and_stay_near(dtype, bits):
    value = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    short = shortened(value, bits)
    assert short.dtype == dtype and torch.equal(shortened(short, bits), short)
    size = value.double().abs().clamp(min=2.0**-14)  # smaller numbers of half precision have fewer bits anyway
    assert ((short.double() - value.double()).abs() <= size * 2.0 ** -(bits + 1)).all()
    large = short.double().abs()[short.abs() > 2.0**-14]
    mantissa = large / 2 ** large.log2().floor()
    assert torch.equal(mantissa * 2**bits, (mantissa * 2**bits).round())
    sizes = [len(zlib.compress(save({"weight": each}))) for each in (value, short)]
    assert sizes[1] < 0.9 * sizes[0]


def test_the_largest_numbers_do_not_become_infinite_and_short_types_stay():
    assert shortened(torch.tensor([65504.0, -65504.0, 0.0], dtype=torch.float16), 4).tolist() == [63488, -63488, 0]
    number = torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert torch.equal(shortened(number, 7), number) and shortened(torch.tensor([7]), 2).tolist() == [7]


def test_a_folder_is_written_that_makes_nearly_the_same_picture(tiny_model_folder, tmp_path, capsys):
    target = tmp_path / "short"
    assert main([str(tiny_model_folder), str(target), "--half", "transformer", "--bits", "6"]) == 0
    assert "transformer/diffusion_pytorch_model.safetensors: " in capsys.readouterr().out
    types = {
        part: {value.dtype for value in load_file(next((target / part).glob("*.safetensors"))).values()}
        for part in ("transformer", "vae")
    }
    assert types == {"transformer": {torch.float16}, "vae": {torch.float32}}
    options = {"num_inference_steps": 2, "output_type": "pt"}
    one, other = (
        PTDiTPipeline.from_pretrained(each)("a ring", generator=torch.Generator().manual_seed(0), **options).images
        for each in (tiny_model_folder, target)
    )
    assert 0 < (one.float() - other.float()).abs().max() < 0.1
    for wrong in ([str(tmp_path), str(tmp_path / "new")], [str(tiny_model_folder), str(target)]):
        with pytest.raises(SystemExit):
            main(wrong)
