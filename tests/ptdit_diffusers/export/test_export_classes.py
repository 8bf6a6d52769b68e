"""An exported class-conditional folder loads and runs with and without this package."""

import json

import pytest
import torch

from ptdit_diffusers import ClassToImagePipeline, DiffiTImagePipeline
from ptdit_diffusers.cli import main
from tests.ptdit_diffusers.class_models import tiny_diffit_pipeline, tiny_folder, tiny_pipeline
from tests.ptdit_diffusers.export.test_export import WITHOUT_US, run_python
from tests.ptdit_diffusers.pipelines.test_pipeline_diffit_image import tiny_pipeline as tiny_image_pipeline

STRANGER = """
import torch
from diffusers import DiffusionPipeline

def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("red star", generator=torch.manual_seed(0), num_inference_steps=3, output_type="latent").images

trusted = {"custom_pipeline": "pipeline", "trust_remote_code": True}
pipe = DiffusionPipeline.from_pretrained(FOLDER, **trusted)
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
first = generate(pipe)
torch.save(first, "first.pt")
pipe.save_pretrained("again")
assert torch.equal(generate(DiffusionPipeline.from_pretrained("again", **trusted)), first)
assert "ptdit_diffusers" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_diffit_pipeline])
def test_an_exported_folder_loads_where_this_package_is_missing(tmp_path, pipeline):
    model, folder = tiny_folder(tmp_path / "model", pipeline), tmp_path / "export"
    options = ["--prompt", "golden retriever", "--license", "cc-by-nc-4.0"]
    assert main(["export", "--model", str(model), "--output", str(folder), *options]) == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc-by-nc-4.0") and 'pipe("golden retriever"' in card
    assert "AutoPipeline" not in card and "ModularPipeline" not in card
    assert (folder / "samples" / "0.png").is_file() and not (folder / "modular_config.json").exists()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "ClassToImagePipeline" and index["id2label"]["1"] == "red star"

    pipe = ClassToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe("red star", generator=torch.manual_seed(0), **options).images
    code = f"{WITHOUT_US}\nFOLDER = {str(folder)!r}\n{STRANGER}"
    assert torch.equal(run_python(code, tmp_path), expected)
    saved = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert saved == {path.name for path in folder.glob("*.py")}


@pytest.mark.slow
def test_an_exported_image_space_model_loads_where_this_package_is_missing(tmp_path):
    model, folder = tiny_folder(tmp_path / "model", tiny_image_pipeline), tmp_path / "export"
    assert main(["export", "--model", str(model), "--output", str(folder), "--prompt", "blue disk"]) == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "no reproduction of the paper's" in card and 'pipe("blue disk"' in card
    pipe = DiffiTImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe("red star", generator=torch.manual_seed(0), **options).images
    code = f"{WITHOUT_US}\nFOLDER = {str(folder)!r}\n{STRANGER}"
    assert torch.equal(run_python(code, tmp_path), expected)
