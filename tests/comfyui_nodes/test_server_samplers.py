"""Every sampler and scheduler that a real ComfyUI offers, over the embedded model: finite, and what was asked."""

import pytest

from .graph import Graph, Server, output, wrong_in
from .test_server import finite_latents
from .test_server_numbers import PROMPT, embedded

pytestmark = pytest.mark.comfy
STEPS, PICTURES = 12, 2
STEP_BY_GUIDANCE = "cfg_pp"  # samplers of this name use the unguided prediction as well, and want a scale near 1
# Mixes fresh noise in as for models that add noise to the data, not as for flow; its siblings know both.
NOT_FOR_FLOW = "dpmpp_2s_ancestral_cfg_pp"


def offered(server: Server, name: str) -> list[str]:
    """Values of one of KSampler's lists."""
    kind, *more = server.get("/object_info/KSampler")["KSampler"]["input"]["required"][name]
    return kind if isinstance(kind, list) else more[0]["options"]


def right_pictures(server: Server, sampler: str, scheduler: str) -> int:
    """How many pictures of a batch show what was asked."""
    g = Graph()
    loader, positive, negative, _ = embedded(g, "fp32")
    latent = g("PTDiTEmptyLatent", width=128, height=128, aspect="1:1", length=1, views=0, batch_size=PICTURES)
    cfg = 1.0 if STEP_BY_GUIDANCE in sampler else 4.0
    latent = g("KSampler", model=loader, positive=positive, negative=negative, latent_image=latent, seed=3,
               steps=STEPS, cfg=cfg, sampler_name=sampler, scheduler=scheduler, denoise=1.0)  # fmt: skip
    g("SaveLatent", samples=latent, filename_prefix="sampler")
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="sampler")
    result = server.queue(g)
    assert result["ok"], result["message"]
    finite_latents(server, result)
    pictures = [path for path in server.files(result) if path.suffix == ".png"]
    assert len(pictures) == PICTURES
    return sum(not wrong_in(path, PROMPT) for path in pictures)


@pytest.mark.parametrize("kind", ["sampler_name", "scheduler"])
def test_every_one_gives_finite_latents_and_all_but_a_few_draw_what_was_asked(server, kind, record_property):
    right, failed = {}, {}
    for name in offered(server, kind):
        pair = (name, "simple") if kind == "sampler_name" else ("euler", name)
        try:
            right[name] = right_pictures(server, *pair)
        except AssertionError as error:
            failed[name] = str(error)[:200]
        record_property(name, f"{right.get(name, failed.get(name))} of {PICTURES} right")
    assert not failed, failed
    weak = {name for name, count in right.items() if not count}
    assert len(right) >= 9 and weak <= {NOT_FOR_FLOW}, f"none right: {', '.join(sorted(weak))}"
