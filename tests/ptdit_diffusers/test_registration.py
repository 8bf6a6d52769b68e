"""After importing our pipeline diffusers' own loaders find our classes, in every spelling and form."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.pipelines import auto_pipeline

import ptdit_diffusers
from ptdit_diffusers import PTDiTPipeline, PTDiTTransformer3DModel, import_hook
from ptdit_diffusers.core.embedded import embedded_model_names, embedded_model_path
from ptdit_diffusers.import_hook import register
from ptdit_diffusers.pipelines.ptdit_registration import register_classes, single_file_vae
from tests.processes import run


def test_diffusers_loads_the_folder_as_one_of_its_own(tiny_model_folder):
    for loader in (DiffusionPipeline, AutoPipelineForText2Image, PTDiTPipeline):
        pipe = loader.from_pretrained(str(tiny_model_folder))
        assert type(pipe) is PTDiTPipeline
        assert type(pipe.transformer) is PTDiTTransformer3DModel
    assert type(AutoModel.from_pretrained(str(tiny_model_folder), subfolder="transformer")) is PTDiTTransformer3DModel


def test_the_index_may_name_our_package_as_the_library(tiny_model_folder, tmp_path):
    index = json.loads((tiny_model_folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == ["diffusers", "PTDiTTransformer3DModel"]
    for part in tiny_model_folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    index["transformer"] = ["ptdit_diffusers", "PTDiTTransformer3DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path)).transformer) is PTDiTTransformer3DModel


@pytest.mark.slow
@pytest.mark.parametrize("name", embedded_model_names())
def test_an_embedded_model_loads_in_every_loader_of_diffusers(name):
    folder = str(embedded_model_path(name))
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    loaders = {DiffusionPipeline: index["_class_name"]}
    if index["_class_name"] == "PTDiTPipeline":
        loaders |= {
            AutoPipelineForText2Image: "PTDiTPipeline",
            AutoPipelineForImage2Image: "PTDiTImg2ImgPipeline",
            AutoPipelineForInpainting: "PTDiTInpaintPipeline",
        }
    for loader, kind in loaders.items():
        assert type(loader.from_pretrained(folder)).__name__ == kind
    for part in {"transformer", "unet", "vae"} & set(index):
        assert type(AutoModel.from_pretrained(folder, subfolder=part)).__name__ == index[part][1]


def test_registering_twice_changes_nothing():
    before = diffusers.PTDiTPipeline, len(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING)
    register()
    assert before == (diffusers.PTDiTPipeline, len(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING))
    assert diffusers.pipelines.PTDiTPipeline is PTDiTPipeline


FIRST_IMPORTS = (
    "import ptdit_diffusers",
    "import ptdit_diffusers, diffusers",
    "import diffusers, ptdit_diffusers",
    "import ptdit_diffusers.models.transformer_ptdit",
    "import ptdit_diffusers.pipelines.ptdit_lora",
    "import ptdit_diffusers.conversion.networks",
)
LOADS = """
from diffusers import AutoModel, AutoPipelineForInpainting, DiffusionPipeline, PTDiTTransformer3DModel
assert type(DiffusionPipeline.from_pretrained(FOLDER)).__name__ == "PTDiTPipeline"
assert type(AutoPipelineForInpainting.from_pretrained(FOLDER)).__name__ == "PTDiTInpaintPipeline"
assert type(AutoModel.from_pretrained(FOLDER, subfolder="vae")).__name__ == "AutoencoderKLOpenSoraPlan"
assert PTDiTTransformer3DModel.from_single_file.__module__ == "ptdit_diffusers.conversion.single_file"
"""
FORKS = """
import os, sys  # what diffusers needs is imported once, and diffusers itself in each fork
import accelerate, peft, scipy.stats, torch._dynamo, torch.distributed.fsdp, transformers.models.t5.modeling_t5
assert "diffusers" not in sys.modules
for first in FIRST_IMPORTS:
    if (child := os.fork()) == 0:
        exec(first + LOADS)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.slow
def test_importing_any_module_of_ours_is_enough_for_the_loaders_of_diffusers(tiny_model_folder):
    code = f"FOLDER = {str(tiny_model_folder)!r}\n{FIRST_IMPORTS=}\n{LOADS=}\n" + FORKS
    done = run(["-c", code], real=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_release_without_a_table_we_know_is_named_with_what_to_do(monkeypatch):
    monkeypatch.delattr("diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES")
    message = f"diffusers {diffusers.__version__} has no diffusers.loaders.single_file_model.SINGLE.*0.41 to 0.42.*pip"
    with pytest.raises(ImportError, match=message):
        register_classes()


def test_a_failure_to_register_is_a_warning_for_whoever_imports_diffusers(monkeypatch):
    monkeypatch.delattr("diffusers.loaders.peft._SET_ADAPTER_SCALE_FN_MAPPING")
    with pytest.warns(UserWarning, match="diffusers will not find the classes of ptdit_diffusers: diffusers .*no"):
        import_hook.register_when_diffusers_is_imported()


@torch.no_grad()
def test_first_block_cache_and_layer_skipping_know_our_block(tiny_model_folder):
    from diffusers import FirstBlockCacheConfig

    pipe = PTDiTPipeline.from_pretrained(str(tiny_model_folder))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("a red star", generator=torch.manual_seed(0), **arguments).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    cached = pipe("a red star", generator=torch.manual_seed(0), **arguments).images
    assert torch.allclose(plain, cached, atol=1e-5)


def test_a_linked_training_checkpoint_of_the_vae_is_refused_instead_of_read_without_its_averages(tmp_path):
    vae = ptdit_diffusers.AutoencoderKLOpenSoraPlan(
        hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4
    )
    vae.save_pretrained(tmp_path / "config")
    weights = vae.state_dict()
    with pytest.raises(ValueError, match="ptdit convert"):  # what diffusers hands over of a file that it fetched
        single_file_vae({"gen_model": weights})
    load = ptdit_diffusers.AutoencoderKLOpenSoraPlan.from_single_file
    torch.save({"state_dict": {"gen_model": {}}, "ema_state_dict": weights}, tmp_path / "raw.ckpt")
    again = load(str(tmp_path / "raw.ckpt"), config=str(tmp_path / "config"))  # its norms are not in the weights
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PTDiTPipelin"):
        _ = ptdit_diffusers.PTDiTPipelin
