"""Distillation on the student's own states: where its steps lead, the teacher goes on; runs of the real command."""

from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lora.distill import main
from lora.distill_config import DistillSettings
from lora.distill_task import SegmentTask
from lora.paths import Paths, noise_levels
from ptdit_diffusers.training.base_model import BaseModel

from .conftest import CAPTIONS

FILE = "lora/pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")


def test_the_target_is_the_teachers_own_way_from_where_the_student_is(prompts, tiny_model_folder, tmp_path):
    AcceleratorState._reset_state(True)
    base = BaseModel(str(tiny_model_folder))
    settings = DistillSettings(
        base=str(tiny_model_folder), prompts=str(prompts), output_dir=str(tmp_path / "x"), own_states=1.0,
        steps=2, points=2, teacher_steps=4, paths=3, held_out=1, rank=2, batch_size=2, guidance=3.0,
    )  # fmt: skip
    paths = Paths(base, settings, CAPTIONS)
    paths.cache.add_captions(dict.fromkeys(["", *paths.captions], ""), CPU)
    task = SegmentTask(settings, base, paths, Accelerator(cpu=True))
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = task.data[0]
    assert batch["segment"].tolist() == [1, 1] and "noisy" not in batch
    found = task.continued(batch)
    levels = noise_levels(base, 4, paths.side, 1)
    expected = task.reached(batch["noise"], levels[:3:2], batch["text"], batch["mask"])
    torch.testing.assert_close(found["noisy"], expected)
    assert (expected - batch["noise"]).abs().max() > 1e-2
    with task.teacher(), torch.no_grad():
        state = expected
        for one, two in pairwise(levels[2:]):
            time = torch.full((2,), one)
            v, v_empty = (
                task.predict(state, time, text.expand(2, -1, -1), mask.expand(2, -1))
                for text, mask in ((batch["text"], batch["mask"]), task.empty)
            )
            state = state - (one - two) * (v_empty + 3.0 * (v - v_empty))
    torch.testing.assert_close(found["target"], (expected - state) / levels[2], atol=1e-5, rtol=1e-4)
    task.loss(batch)[0].backward()
    assert any(p.grad is not None and p.grad.any() for n, p in task.model.named_parameters() if ".lora_" in n)


def test_it_trains_and_resumes_bit_for_bit_and_refuses_what_cannot_be(prompts, tiny_model_folder, tmp_path, capsys):
    def run(output: str, *flags: object) -> int:
        AcceleratorState._reset_state(True)
        words = ["--base", tiny_model_folder, "--prompts", prompts, "--output-dir", tmp_path / output, *flags]
        sizes = "--points 2 --teacher-steps 4 --paths 3 --held-out 1 --batch-size 2 --lr 0.01 --own-states 0.5"
        words += [*sizes.split(), "--log-every", "1", "--precision", "fp32", "--paths-dir", tmp_path / "paths"]
        return main([str(word) for word in words])

    usual = ["--steps", "2", "--rank", "2", "--max-steps", "4", "--checkpoint-every", "2"]
    assert run("straight", *usual) == run("resumed", *usual, "--stop-after", "2") == 0
    assert run("resumed", *usual, "--resume") == 0
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "resumed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    capsys.readouterr()
    for flags, words in (
        (["--steps", "2", "--rank", "0"], "own_states=0.5 needs the teacher in the same weights; nearest: rank=64"),
        (
            ["--steps", "2", "--rank", "2", "--stage", "tdm"],
            "own_states=0.5 is of stage segments, not tdm; leave it out",
        ),
        (
            ["--steps", "2", "--rank", "2", "--fake-first", "3"],
            "fake_first=3 is of stage tdm, not segments; leave it out",
        ),
        (["--steps", "1", "--rank", "2"], "own_states=0.5 is for several steps; nearest: steps=2"),
    ):
        assert run("bad", *flags) == 2 and words in capsys.readouterr().err
