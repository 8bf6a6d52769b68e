"""Devices that share the tokens of one forward get the numbers and the gradients of a single one, for few bytes."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig, TensorParallelConfig
from peft import LoraConfig
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.conversion.quantize import store_in_fp8
from ptdit_diffusers.core.backbones.proxies import ProxyPlan
from ptdit_diffusers.core.backbones.shares import best_plan, window_bounds
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from tests.processes import CAN_FORK
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny

START = "forkserver" if CAN_FORK else "spawn"
RAGGED = {"window_size": (1, 3, 3), "proxy_ratio": (1, 3, 3)}
CASES = {  # name -> settings of the model, latent (height, width, frames)
    "even": ({}, (16, 16, 1)),
    "ragged, odd windows": (RAGGED, (26, 20, 1)),
    "a last share shorter than half a window": ({"window_size": (1, 8, 8), "proxy_ratio": (1, 8, 8)}, (68, 8, 1)),
    "columns": ({}, (4, 40, 1)),
    "frames": ({"window_size": (2, 4, 4), "proxy_ratio": (2, 4, 4)}, (8, 8, 13)),
    "frames, windows of one": ({"window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4)}, (8, 8, 9)),
    "finer proxies": ({"window_size": (1, 4, 4), "proxy_ratio": (1, 2, 2)}, (32, 16, 1)),
    "coarser proxies": ({"window_size": (1, 2, 2), "proxy_ratio": (1, 6, 6)}, (40, 16, 1)),
    "fewer windows than devices": ({"window_size": (1, 8, 8), "proxy_ratio": (1, 8, 8)}, (16, 16, 1)),
    "one window for all devices": ({"window_size": (1, 5, 5), "proxy_ratio": (1, 5, 5)}, (10, 8, 1)),
    "random proxies": ({"proxy_mode": "random", "window_size": (1, 3, 3), "proxy_ratio": (1, 6, 6)}, (28, 12, 1)),
    "first proxies": ({"proxy_mode": "first"}, (24, 16, 1)),
    "no shifted windows": ({"shift_window": False}, (24, 16, 1)),
}


def gradients(transformer: PTDiTTransformer3DModel, weights: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict]:
    """Return the output and the gradients of parameters and latents."""
    latents = inputs.pop("hidden_states").clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    sample = transformer(latents, **inputs, generator=generator).sample
    (sample * weights).sum().backward()
    found = {name: each.grad.clone() for name, each in transformer.named_parameters() if each.grad is not None}
    transformer.zero_grad()
    return sample.detach(), found | {"latents": latents.grad}


def numbers(name: str, devices: int) -> tuple[torch.Tensor, dict]:
    """Return output and gradients of one case, in float64."""
    settings, size = CASES[name]
    inputs = {key: value.double() for key, value in arguments(*size).items()}
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    transformer = tiny(**settings).double()
    weights = torch.randn(inputs["hidden_states"].shape[0], transformer.config.out_channels,
                          *inputs["hidden_states"].shape[2:], dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    return gradients(shared_by(devices, transformer) if devices > 1 else transformer, weights, **inputs)


def compare(name: str, devices: int, whole: torch.Tensor, expected: dict) -> None:
    """Compare one case on all devices with what one found."""
    shared, found = numbers(name, devices)
    error = (shared - whole).norm() / whole.norm()
    assert error < 1e-12, f"{name}: output off by {error}"
    assert set(found) == set(expected), name
    summed = torch.cat([found[parameter].flatten() for parameter in expected])
    dist.all_reduce(summed)  # each device has the part of its own tokens
    parts = summed.split([value.numel() for value in expected.values()])
    for (parameter, value), part in zip(expected.items(), parts, strict=True):
        largest = max(float(value.abs().max()), 1e-3)
        assert (part - value.flatten()).abs().max() < 1e-9 * largest, f"{name}: {parameter}"


class Lines(logging.Handler):
    """Keeps the log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Received(TorchDispatchMode):
    """Counts the bytes that this device receives, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if operation.namespace == "_c10d_functional":
            name, devices = operation.__name__.partition(".")[0], dist.get_world_size()
            if name == "all_gather_into_tensor":
                self.bytes[name] += arguments[0].nbytes * (devices - 1)
            elif name == "reduce_scatter_tensor":
                self.bytes[name] += arguments[0].nbytes // devices * (devices - 1)
            elif name == "all_to_all_single":
                assert arguments[1][dist.get_rank()] == 0  # nothing goes to the device itself
                self.bytes[name] += result.nbytes
            elif name not in ("wait_tensor", "_wrap_tensor_autograd"):
                self.bytes[name] += 1
        return result


def count_bytes(devices: int) -> None:
    """Compare the bytes of a forward and backward with what the sizes say."""
    transformer, inputs = shared_by(devices, tiny(window_size=(1, 4, 4), proxy_ratio=(1, 4, 4))), arguments(96, 32)
    batch, dim, blocks, columns, windows = 2, 32, 2, 16, 12 * 4
    said = Lines()
    logger = logging.getLogger("ptdit_diffusers.models.transformer_ptdit")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    assert transformer.share_of(ProxyPlan((1, 48, 16), (1, 4, 4), (1, 4, 4))).axis == 1
    inputs["hidden_states"].requires_grad_()
    with Received() as seen:
        transformer(**inputs).sample.sum().backward()
    token = batch * dim * 4
    others = devices - 1
    proxies = blocks * others * (windows // devices) * token
    result = others * 48 // devices * columns * batch * 4 * transformer.config.out_channels * 4
    inner = [2] * (dist.get_rank() > 0) + [2] * (dist.get_rank() < devices - 1)  # half a window of each neighbour
    halo = blocks * sum(inner) * columns * token
    expected = {"all_gather_into_tensor": proxies + result, "reduce_scatter_tensor": proxies}
    assert seen.bytes == expected | {"all_to_all_single": 2 * halo}, (seen.bytes, expected, 2 * halo)
    transformer(**inputs)  # the same shape again: nothing is chosen, nothing said
    start, stop = dist.get_rank() * 48 // devices, (dist.get_rank() + 1) * 48 // devices
    vectors = (proxies + halo) // (blocks * token)  # for each sample
    begins, size = " ".join(str(each * 48 // devices) for each in range(devices)), vectors * dim * 4 / 1e6
    assert said.lines == [
        f"device {dist.get_rank() + 1} of {devices} owns token rows {start} to {stop - 1} of 48 (shares begin at "
        f"{begins}), and receives {size:.2f} MB per block and sample: {vectors} vectors of {dim} numbers, float32"
    ]


def shared_by(devices: int, transformer: PTDiTTransformer3DModel) -> PTDiTTransformer3DModel:
    """Return the model with its tokens shared by the devices."""
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=devices))
    return transformer


@torch.no_grad()
def check_manners(devices: int) -> None:
    """Compare with one device: LoRA and other changes of layers before and after, attention backends, one graph."""
    inputs = arguments(20, 12)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0", "linear_2"], init_lora_weights=False)
    changes = {
        "LoRA": lambda transformer: transformer.add_adapter(lora),
        "merged LoRA": lambda transformer: (transformer.add_adapter(lora), transformer.fuse_lora()),
        "fused layers": PTDiTTransformer3DModel.fuse_linear_layers,
        "fused projections": PTDiTTransformer3DModel.fuse_qkv_projections,
        "bf16": lambda transformer: transformer.to(torch.bfloat16),
        "fp8": lambda transformer: store_in_fp8(transformer, torch.float32),
        "backend": lambda transformer: transformer.set_attention_backend("_native_math"),
        "compiled": lambda transformer: transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager"),
        "compiled as one graph": lambda transformer: transformer.compile(fullgraph=True, backend="aot_eager"),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        changes["int8"] = lambda transformer: quantize_(transformer, Int8WeightOnlyConfig())
    for name, change in changes.items():
        limit = 3e-2 if name == "bf16" else 1e-5
        given = {
            key: each.bfloat16() if name == "bf16" and key != "timestep" else each for key, each in inputs.items()
        }
        whole = changed(change)(**given).sample.float()
        shared = [shared_by(devices, changed(change))]  # changed before it is shared, and after
        if not name.startswith("compiled"):
            shared.append(changed(change, shared_by(devices, tiny(**RAGGED))))
        for model in shared:
            error = (model(**given).sample.float() - whole).norm() / whole.norm()
            assert error < limit, f"{name}: {error}"


def changed(change: Callable, transformer: PTDiTTransformer3DModel | None = None) -> PTDiTTransformer3DModel:
    """Return a model after a change, always with the same random weights."""
    transformer = transformer or tiny(**RAGGED)
    torch.manual_seed(7)
    change(transformer)
    return transformer


def check_refusals(devices: int) -> None:
    """What cannot be shared is refused on every device, before anything is sent."""
    transformer = shared_by(devices, tiny())
    with pytest.raises(RuntimeError, match="parallelism is on already"):
        shared_by(devices, transformer)
    with pytest.raises(ValueError, match="cp_plan is not used by PT-DiT"):
        tiny().enable_parallelism(config=ContextParallelConfig(ulysses_degree=devices), cp_plan={})
    with pytest.raises(ValueError, match="TensorParallelConfig: PT-DiT shares tokens, not weights"):
        tiny().enable_parallelism(config=TensorParallelConfig(tp_degree=devices))
    first_block = FirstBlockCacheConfig(threshold=0.1)
    refused = pytest.raises(ValueError, match="FirstBlockCacheConfig decides from tokens what it skips.*MagCacheConf")
    with refused:
        transformer.enable_cache(first_block)
    cached = tiny()
    cached.enable_cache(first_block)
    with refused:
        shared_by(devices, cached)
    cached.disable_cache()
    shared_by(devices, cached)  # what was refused left nothing behind
    with pytest.raises(ValueError, match=f"ring_degree=1 x ulysses_degree={devices + 1} is not the number of proc"):
        shared_by(devices + 1, tiny())
    with pytest.raises(ValueError, match=f"{devices} devices cannot share 1 x 1 x 1 tokens .* nearest: 1 devices"):
        transformer(**arguments(2, 2))


def check_pipeline(devices: int) -> None:
    """A pipeline on several devices gives the picture of one; different seeds are an error on all devices."""
    pipe = PTDiTPipeline.from_pretrained("shapes-128")
    pipe.set_progress_bar_config(disable=True)

    def latents(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="latent").images

    whole = latents(0)
    shared_by(devices, pipe.transformer)
    assert (latents(0) - whole).norm() < 1e-4 * whole.norm()
    with pytest.raises(ValueError, match="the devices have different latents, seeds"):
        latents(dist.get_rank())
    with TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        config = ContextParallelConfig(ulysses_degree=devices)
        for each in (config, ParallelConfig(context_parallel_config=config)):
            pipe.transformer = PTDiTTransformer3DModel.from_pretrained(folder, parallel_config=each)
            assert pipe.transformer._messages.count == devices
            assert (latents(0) - whole).norm() < 1e-4 * whole.norm()


def share_tokens(rank: int, devices: int, meeting_point: str, alone: Path) -> None:
    """One of the processes; a file has what one alone found."""
    torch.set_num_threads(1)
    place = {"init_method": meeting_point, "rank": rank, "world_size": devices}
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **place)
    for name, found in torch.load(alone).items():
        compare(name, devices, *found)
    count_bytes(devices)
    if devices == 2:
        check_manners(devices)
        check_refusals(devices)
        check_pipeline(devices)
    dist.barrier()  # neither leaves while the other still reads
    os._exit(0)  # gloo's threads may still hold tensors, and Python ending under them aborts now and then


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A file with the numbers of every case on one device."""
    file = tmp_path_factory.mktemp("alone") / "numbers.pt"
    torch.save({name: numbers(name, 1) for name in CASES}, file)
    return file


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_devices_share_the_tokens_and_get_the_numbers_and_gradients_of_one(alone: Path, tmp_path: Path, devices: int):
    arguments = devices, (tmp_path / "meeting_point").as_uri(), alone
    torch.multiprocessing.start_processes(share_tokens, arguments, nprocs=devices, start_method=START)


def test_one_process_alone_is_told_to_start_others():
    with pytest.raises(RuntimeError, match="torch.distributed is not initialized: start the processes with torchrun"):
        shared_by(2, tiny())


@pytest.mark.parametrize(
    ("size", "window", "devices", "bounds"),
    [
        (100, 8, 8, (0, 8, 16, 24, 40, 56, 72, 88, 100)),
        (98, 8, 3, (0, 32, 64, 98)),
        (64, 8, 8, tuple(range(0, 65, 8))),
    ],
)
def test_shares_are_whole_windows_and_the_last_ones_are_larger(size, window, devices, bounds):
    assert window_bounds(size, window, devices) == bounds


def test_the_axis_with_the_least_work_is_shared():
    plan = best_plan((1, 64, 64), (1, 8, 8), True, 64, 1152, 4)
    assert (plan.axis, plan.bounds, plan.vectors) == (1, (0, 16, 32, 48, 64), 48 + 512)
    frames = best_plan((72, 32, 32), (1, 8, 8), True, 72 * 16, 1152, 8)
    assert frames.axis == 0 and frames.vectors == 1008  # windows of one frame: proxies alone travel
    cut = best_plan((1, 64, 64), (1, 8, 8), True, 64, 1152, 3)
    assert cut.bounds == (0, 21, 42, 64)  # eight windows do not divide by three
