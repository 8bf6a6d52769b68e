"""The two ways to install on a real ComfyUI: the whole repository, and a link to `comfyui_nodes` alone."""

import os
from pathlib import Path

import pytest

from .graph import EMBEDDED, ROOT, Graph, Server, output
from .test_layout import NODES

pytestmark = pytest.mark.comfy
PACK = "pt-dit.pack-1"


def test_a_clone_offers_templates_help_and_both_languages(server):
    templates = server.get("/api/workflow_templates")
    (ours,) = (names for pack, names in templates.items() if pack.startswith("pt-dit"))
    assert set(ours) == {file.stem for file in (ROOT / "example_workflows").glob("*.json")}
    for name in ours:
        assert len(server.read(f"/api/workflow_templates/{PACK}/{name}.jpg")) > 1000
    languages = server.get("/api/i18n")
    for language in ("en", "zh"):
        assert set(NODES) <= set(languages[language]["nodeDefs"])
    for name in NODES:
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert server.read(f"/extensions/{PACK}/docs/{page}").startswith(b"#")


@pytest.fixture
def linked(tmp_path: Path):
    """A ComfyUI that has only a link to `comfyui_nodes`."""
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("COMFYUI_DIR names no ComfyUI folder")
    running = Server(Path(folder), tmp_path, pack=ROOT / "comfyui_nodes")
    yield running
    running.stop()


def test_a_link_to_the_nodes_alone_has_nodes_and_help_and_draws(linked):
    assert set(NODES) <= set(linked.get("/object_info"))
    assert linked.read(f"/extensions/{PACK}/docs/PTDiTWindowProxy.md").startswith(b"#")
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default")
    text = g("PTDiTTextEncode", clip=output(loader, 1), text="a red circle", literal=True, cleaning=False)
    latent = g("PTDiTEmptyLatent", width=128, height=128, aspect="1:1", length=1, views=0, batch_size=1)
    latent = g("KSampler", model=loader, positive=text, negative=text, latent_image=latent, seed=0, steps=2, cfg=1.0,
               sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
    pixels = g("VAEDecode", samples=latent, vae=output(loader, 2))
    g("SaveImage", images=pixels, filename_prefix="linked")
    result = linked.queue(g)
    assert result["ok"], result["message"]
    assert len(linked.files(result)) == 1
