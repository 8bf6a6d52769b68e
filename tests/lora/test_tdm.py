"""Trajectory distribution matching: its equations, its three models in one, and runs of the real command."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lora.distill import main
from lora.distill_config import DistillSettings
from lora.paths import Paths
from lora.tdm import FAKE, TDMTask, renoised
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.checkpoint import load_checkpoint

from .conftest import CAPTIONS

FILE = "lora/pytorch_lora_weights.safetensors"


def test_the_noisy_state_is_that_of_the_clean_one_and_joins_both_noises():
    generator = torch.Generator().manual_seed(0)
    clean, noise, fresh = (torch.randn(5000, 1, 1, 1, 1, generator=generator) for _ in range(3))
    begin, end = 0.8, 0.3
    state, velocity = (1 - begin) * clean + begin * noise, noise - clean
    t = torch.full((5000,), 0.5)
    found, noisy, own = renoised(state, velocity, begin, end, t, fresh)
    torch.testing.assert_close(found, clean)
    joined = own + clean
    torch.testing.assert_close(noisy, 0.5 * clean + 0.5 * joined)
    assert joined.std() == pytest.approx(1, abs=0.03)  # the two noises together are noise again
    assert (joined * noise).mean() == pytest.approx((1 - 0.5) / (1 - end) * end / 0.5, abs=0.03)
    _, at_end, _ = renoised(state, velocity, begin, end, torch.full((5000,), end), fresh)
    torch.testing.assert_close(at_end, (1 - end) * clean + end * noise, atol=1e-3, rtol=1e-3)  # a step, and no noise
    _, _, last = renoised(state, velocity, begin, 0.0, t, fresh)
    torch.testing.assert_close(last + clean, fresh)  # the last step ends without noise: only the fresh one


@pytest.fixture
def task(prompts, tiny_model_folder, tmp_path) -> TDMTask:
    AcceleratorState._reset_state(True)
    base = BaseModel(str(tiny_model_folder))
    settings = DistillSettings(
        base=str(tiny_model_folder), prompts=str(prompts), output_dir=str(tmp_path / "x"), stage="tdm", guidance=1.0,
        steps=2, points=2, teacher_steps=2, paths=3, held_out=1, rank=2, batch_size=2,
    )  # fmt: skip
    paths = Paths(base, settings, CAPTIONS)
    paths.cache.add_captions(dict.fromkeys(["", *paths.captions], ""), torch.device("cpu"))
    return TDMTask(settings, base, paths, Accelerator(cpu=True))


def test_a_fake_score_that_is_the_teachers_moves_nothing_and_one_that_is_not_moves_the_student(task):
    batch = task.data[1]
    task.loss(batch)[0].backward()
    student, fake = ({n: p.grad for n, p in task.model.named_parameters() if f".{a}." in n} for a in ("default", FAKE))
    assert all(grad is not None for grad in (*student.values(), *fake.values()))
    assert max(grad.abs().max() for grad in student.values()) < 1e-6 < max(grad.abs().max() for grad in fake.values())
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if f"lora_B.{FAKE}" in name:
                parameter.normal_(std=0.1)
    task.model.zero_grad()
    task.loss(batch)[0].backward()
    assert max(p.grad.abs().max() for n, p in task.model.named_parameters() if ".default." in n) > 1e-5


def test_first_steps_can_keep_to_the_paths_and_the_fake_score_can_learn_alone(task):
    task.settings.keep_first, task.settings.fake_first = 1, 1
    task.settings.teacher_steps = 4  # two in a segment, which one forward of the teacher cannot make
    task.paths.make(task.model, task.paths.missing(), torch.device("cpu"))
    first = next(number for number in range(1, 9) if task.data[number]["segment"][0] == 0)
    batch, order = task.data[first], task.data.order
    indices = [order.index(first * order.global_batch + place) for place in order.places]
    states = torch.stack([task.paths.states(index, (0, 1)) for index in indices])
    begin, end = task.paths.times[:2]
    torch.testing.assert_close(batch["start"], states[:, 0])
    torch.testing.assert_close(batch["start"] - (begin - end) * batch["path"], states[:, 1])
    task.loss(batch)[0].backward()
    student = [p.grad for n, p in task.model.named_parameters() if ".default." in n]
    assert max(grad.abs().max() for grad in student) > 1e-5  # without it nothing moves the teacher itself
    task.model.zero_grad()
    task.loss(batch | {"learns": task.data[0]["learns"]})[0].backward()
    assert all(not p.grad.any() for n, p in task.model.named_parameters() if ".default." in n)
    assert any(p.grad.any() for n, p in task.model.named_parameters() if f".{FAKE}." in n)


def test_a_step_must_be_left_to_the_stage():
    with pytest.raises(ValueError, match="keep_first=4 leaves none of steps=4 to stage tdm; nearest: 3"):
        DistillSettings(output_dir="x", prompts="y", stage="tdm", keep_first=4)


def test_compiled_blocks_follow_the_adapters(task):
    """Each way to act has its own graph; a stale one would give the numbers of another adapter."""
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = []
    for compiled in (False, True):
        if compiled:
            task.model.compile_repeated_blocks(dynamic=False, backend="eager")
        for number in (0, 1, 0):
            task.model.zero_grad()
            loss, numbers = task.loss(task.data[number])
            loss.backward()
            found.append([*numbers.values(), *(p.grad.clone() for p in task.model.parameters() if p.grad is not None)])
    for plain, fast in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


def test_student_fake_score_and_teacher_are_one_model(task):
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = task.data[0]
    inputs = [batch[name] for name in ("noise", "share", "text", "mask")]
    found = []
    with torch.no_grad():
        for adapter in ("default", FAKE, None, "default"):
            task.act_as(adapter)
            found.append(task.predict(*inputs))
    assert torch.equal(found[0], found[3])
    assert all((found[one] - found[two]).abs().max() > 1e-3 for one, two in ((0, 1), (0, 2), (1, 2)))


def test_it_goes_on_from_a_student_and_resumes_bit_for_bit(prompts, tiny_model_folder, tmp_path):
    def run(output: str, *flags: object) -> None:
        AcceleratorState._reset_state(True)
        words = ["--base", tiny_model_folder, "--prompts", prompts, "--output-dir", tmp_path / output, *flags]
        sizes = "--steps 2 --points 2 --teacher-steps 2 --paths 3 --held-out 1 --rank 2 --batch-size 2 --lr 0.01"
        words += [*sizes.split(), "--log-every", "1", "--precision", "fp32", "--paths-dir", tmp_path / "paths"]
        assert main([str(word) for word in words]) == 0

    run("segments", "--max-steps", "1")
    start = ["--stage", "tdm", "--start", tmp_path / "segments" / "lora", "--checkpoint-every", "2"]
    run("straight", *start, "--max-steps", "4")
    run("resumed", *start, "--max-steps", "4", "--stop-after", "2")
    halfway = load_checkpoint(tmp_path / "resumed")["model"]
    before = load_file((tmp_path / "segments").rename(tmp_path / "gone") / FILE)  # a resume does not need the start
    run("resumed", *start, "--max-steps", "4", "--resume")
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "resumed"))
    assert before.keys() == one.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], before[key]) for key in one)
    end = load_checkpoint(tmp_path / "resumed")["model"]
    for adapter in ("default", FAKE):  # both were trained after the sheet, which switches adapters
        assert any(not torch.equal(end[key], halfway[key]) for key in end if f".{adapter}." in key)
