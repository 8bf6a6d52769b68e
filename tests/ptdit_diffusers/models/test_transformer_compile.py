"""How often the transformer compiles, and how its memory grows with tokens."""

import pytest
import torch

from ptdit_diffusers.core.backbones.proxies import ProxyPlan, proxy_index, random_numbers
from scripts.benchmarks.memory import PeakMemory
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny


@pytest.fixture
def graphs():
    """Graphs that were made, and a backend that counts them."""
    torch._dynamo.reset()
    made = []
    yield made
    torch._dynamo.reset()


def counting(made):
    def backend(graph, _):
        made.append(graph)
        return graph.forward

    return backend


@pytest.mark.slow
@torch.no_grad()
def test_steps_and_prompts_of_one_size_share_a_graph(graphs):
    compiled = torch.compile(tiny(num_layers=1), fullgraph=True, backend=counting(graphs))
    for prompt in range(2):
        for step in (900.0, 500.5, 1.0):
            inputs = arguments(16, 16)
            inputs["timestep"] = torch.full((2,), step)
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + prompt
            compiled(**inputs)
    assert len(graphs) == 1


def test_random_proxies_compile_without_a_break_at_sizes_that_are_not_known(graphs):
    def sample(video):
        plan = ProxyPlan(video.shape[1:4], (1, 2, 2), (1, 2, 2))
        uniform = random_numbers(len(video), plan.number(), None, video.device)
        return proxy_index(*plan, uniform, video.device)

    compiled = torch.compile(sample, fullgraph=True, dynamic=True, backend=counting(graphs))
    for rows, columns in ((8, 6), (12, 20)):
        video = torch.zeros(2, 3, rows, columns)
        torch.manual_seed(3)
        expected = sample(video)
        torch.manual_seed(3)
        assert torch.equal(compiled(video), expected) and len(graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_blocks_share_a_graph_and_a_new_size_needs_one_more(graphs):
    transformer = tiny(num_layers=2)
    transformer.compile_repeated_blocks(fullgraph=True, backend=counting(graphs))
    for (height, width), number in (((16, 16), 1), ((24, 40), 2), ((32, 20), 2)):
        sample = transformer(**arguments(height, width)).sample
        assert torch.allclose(sample, tiny(num_layers=2)(**arguments(height, width)).sample, atol=1e-5)
        assert len(graphs) == number


@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_peak_memory_grows_linearly_with_tokens(fused):
    transformer = tiny()
    if fused:
        transformer.fuse_linear_layers()
    peaks = []
    for side in (16, 32, 64):
        window = (1, side // 8, side // 8)  # the paper's rule: the number of windows stays
        with PeakMemory() as memory:
            transformer(**arguments(side, side), window_size=window, proxy_ratio=window)
        assert ProxyPlan((1, side // 2, side // 2), window, window).number() == 16
        peaks.append(memory.peak / side**2)
    assert max(peaks) < 1.2 * min(peaks)


def test_saved_activations_grow_linearly_with_tokens():
    transformer = tiny().train()
    sizes = []
    for side in (16, 32, 64):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel() if tensor._base is None else 0)
            return tensor

        window = (1, side // 8, side // 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transformer(**arguments(side, side), window_size=window, proxy_ratio=window)
        sizes.append(sum(saved))
    assert (sizes[2] - sizes[1]) < 4.4 * (sizes[1] - sizes[0])  # tokens x 4, less what does not grow
