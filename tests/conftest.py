"""What tests of several modules share: the environment, worker processes, fixtures. All run offline, on the CPU."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import LIBRARIES, ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: threads slow small tensors and other workers
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
multiprocessing.set_forkserver_preload(list(LIBRARIES))  # with modules of this tree, wherever the package is installed
gc.disable()  # until all tests are collected: what the imports make stays

TINY_WORDS = (
    "a an the above below inside left right of two small large red green blue purple yellow white black circle square "
    "star stars ring heart triangle background on with and"
).split()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share many tests between processes; a few tests, which are named, are faster in one."""
    few = all("::" in name or name.endswith(".py") for name in config.args)
    return 0 if few else min(os.cpu_count() or 1, 4)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each of several workers begin with an equal part of the files that have slow tests.

    A worker that is done takes half of what another one has left, from its end: those are short tests, and no worker
    waits long for the last one. Tests of a file stay together, for its fixtures.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    slow = {item.path: None for item in reversed(items) if item.get_closest_marker("slow")}  # whole commands first
    tests = {path: [item for item in items if item.path == path] for path in slow}
    others = [item for item in items if item.path not in slow]
    ordered = []
    for number in range(workers):
        part = [item for path in [*slow][number::workers] for item in tests[path]]
        share = (len(items) - len(ordered)) // (workers - number)  # as many as the worker gets at first
        room = max(share - len(part), 0)
        ordered += part + others[:room]
        others = others[room:]
    items[:] = ordered + others


def pytest_collection_finish() -> None:
    """Keep the objects of the libraries, which are millions, out of every later garbage collection."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that makes symbolic links where Windows does not allow them (error 1314)."""
    try:
        return (yield)
    except OSError as error:
        if getattr(error, "winerror", None) == 1314:
            pytest.skip("Windows allows symbolic links in developer mode only")
        raise


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """Take back what training leaves in the process: environment variables and accelerate's shared state."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture
def native_again():
    """`set_attention_backend` also changes diffusers' global choice, and no reset takes that back."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder of the real classes with random weights; its own size is 64 x 64 pixels."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel

    from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
    from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
    from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    width = 32
    pipe = PTDiTPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        ).eval(),
        vae=AutoencoderKLOpenSoraPlan(
            hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4
        ),
        transformer=PTDiTTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            sample_size=8,
            caption_channels=width,
            window_size=(1, 2, 2),
            proxy_ratio=(1, 2, 2),
            num_windows=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three squares and two wide pictures, captions beside four of them."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    choice = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (80, 80), (64, 64), (96, 48), (100, 50)]):
        blocks = choice.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(folder / f"{index}.png")
        if index != 2:
            (folder / f"{index}.txt").write_text("a red star", encoding="utf-8")
    return folder


def word_tokenizer():
    """A tokeniser of the embedded model's kind: one token per word, punctuation and case dropped."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *TINY_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
