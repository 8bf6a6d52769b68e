"""Every sampler and scheduler that a real ComfyUI offers, over the embedded model: finite, and what was asked."""

import pytest

from .graph import Graph, Server, output, wrong_in
from .test_server import finite_latents
from .test_server_numbers import PROMPT, embedded

pytestmark = pytest.mark.comfy
STEPS = 10
STEP_BY_GUIDANCE = "cfg_pp"  # samplers of this name use the unguided prediction as well, and want a scale near 1
# Mixes fresh noise in as for models that add noise to the data, not as for flow; its siblings know both.
NOT_FOR_FLOW = "dpmpp_2s_ancestral_cfg_pp"


def offered(server: Server, name: str) -> list[str]:
    """Values of one of KSampler's lists."""
    kind, *more = server.get("/object_info/KSampler")["KSampler"]["input"]["required"][name]
    return kind if isinstance(kind, list) else more[0]["options"]


def wrong_with(server: Server, sampler: str, scheduler: str) -> tuple[str, ...]:
    """What the picture lacks of what was asked."""
    g = Graph()
    loader, positive, negative, latent = embedded(g, "fp32")
    cfg = 1.0 if STEP_BY_GUIDANCE in sampler else 4.0
    latent = g("KSampler", model=loader, positive=positive, negative=negative, latent_image=latent, seed=3,
               steps=STEPS, cfg=cfg, sampler_name=sampler, scheduler=scheduler, denoise=1.0)  # fmt: skip
    g("SaveLatent", samples=latent, filename_prefix="sampler")
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="sampler")
    result = server.queue(g)
    assert result["ok"], result["message"]
    finite_latents(server, result)
    (picture,) = [path for path in server.files(result) if path.suffix == ".png"]
    return wrong_in(picture, PROMPT)


@pytest.mark.parametrize("kind", ["sampler_name", "scheduler"])
def test_every_one_gives_finite_latents_and_nearly_all_draw_what_was_asked(server, kind, record_property):
    wrong, failed = {}, {}
    for name in offered(server, kind):
        pair = (name, "simple") if kind == "sampler_name" else ("euler", name)
        try:
            wrong[name] = wrong_with(server, *pair)
        except AssertionError as error:
            failed[name] = str(error)[:200]
        record_property(name, "; ".join(wrong.get(name, [failed.get(name, "")])) or "right")
    assert not failed, failed
    weak = {name: words for name, words in wrong.items() if words and name != NOT_FOR_FLOW}
    assert len(wrong) >= 9 and len(weak) <= len(wrong) / 4, weak  # ten steps are few for samplers of high order
