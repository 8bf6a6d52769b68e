"""The training script: settings, exact resume, stop signals, what a run writes, the export of the text stage."""

import json
import signal
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ptdit_diffusers.training.muon import Float32Muon
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.processes import stop_signals
from ptdit_diffusers.training.randomness import numpy_generator, torch_generator
from ptdit_diffusers.training.schedules import warmup_hold_decay
from ptdit_diffusers.training.settings import load_settings
from scripts import train
from scripts.datasets.shapes import VOCABULARY, describe, sample_scene
from scripts.embedded_models import text_stage
from tests.processes import run

ROOT = Path(__file__).parents[3]
TINY = {
    "seed": 3,
    "steps": 4,
    "batch_size": 4,
    "accumulation": 2,
    "warmup": 1,
    "log_every": 1,
    "sheet_every": 2,
    "checkpoint_every": 2,
    "model": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1},
    "data": {"scenes": 40, "held_out_captions": 4},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config file with one tiny text run in tmp_path/run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"text": {"output_dir": str(tmp_path / "run"), **TINY}}), encoding="utf-8")
    return path


def run_script(config: Path, *flags: str) -> int:
    return train.main(["--config", str(config), "--stage", "text", *flags])


def assert_same(first: object, second: object) -> None:
    """Bit-equal, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, two in zip(first, second, strict=True):
            assert_same(one, two)
    else:
        assert first == second


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("muon", ["", "SelfAttention|DenseReluDense"])
def test_two_steps_and_two_resumed_steps_equal_four_steps_bit_for_bit(tiny: Path, tmp_path: Path, muon: str) -> None:
    tiny.write_text(
        tiny.read_text(encoding="utf-8").replace("seed: 3", f"seed: 3\n  muon: {muon!r}"), encoding="utf-8"
    )
    assert run_script(tiny) == 0
    straight = load_checkpoint(tmp_path / "run")
    log = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    last = checkpoints(tmp_path / "run")[-1]
    last.rename(tmp_path / "aside")
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert run_script(tiny, "--set", "workers=1") == 0
    calls = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["calls"]
    assert [(call["from_step"], call["settings_before"]) for call in calls] == [(0, {}), (2, {"workers": 0})]
    resumed = load_checkpoint(tmp_path / "run")
    assert straight["step"] == resumed["step"] == 4
    assert_same(straight, resumed)
    assert [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line] == log


def test_muon_takes_the_named_matrices_and_adamw_the_rest(monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8))
    parameters = dict(model.named_parameters())
    options = {"lr": 1e-3, "weight_decay": 0.01, "decay_vectors": False}
    adamw, muon = make_optimizers(parameters, muon="^0", **options)
    assert [type(each) for each in (adamw, muon)] == [torch.optim.AdamW, torch.optim.Muon]
    assert [[tuple(p.shape) for p in group["params"]] for group in adamw.param_groups] == [[(4, 8)], [(8,)]]
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(8, 8)]
    assert [type(each) for each in make_optimizers(parameters, **options)] == [torch.optim.AdamW]
    with pytest.raises(ValueError, match="muon='attention' matches no matrix"):
        make_optimizers(parameters, muon="attention", **options)


def test_muon_is_the_same_but_for_rounding_on_a_cpu_that_does_not_multiply_bfloat16(monkeypatch) -> None:
    weights = []
    for able in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: {"avx512_bf16": able})
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False), torch.nn.Embedding(2, 2))
        before = model[0].weight.detach().clone()
        _, muon = make_optimizers(dict(model.named_parameters()), lr=1e-3, weight_decay=0.01, muon="^0")
        assert type(muon) is (torch.optim.Muon if able else Float32Muon)
        model[0](torch.randn(40, 8)).pow(4).sum().backward()
        muon.step()
        weights.append(model[0].weight.detach() - before)
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).norm() < 0.02 * weights[1].norm()


def test_processes_that_do_not_know_each_other_are_refused(tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        run_script(tiny)
    assert "2 processes were started but do not know each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("able", [True, False])
def test_slow_bfloat16_is_said(tiny: Path, monkeypatch, caplog, able: bool) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": able})
    assert run_script(tiny, "--set", "mixed_precision=bf16") == 0
    AcceleratorState._reset_state(True)
    assert ("mixed_precision=no is several times faster" in caplog.text) == (not able)


def test_a_run_writes_log_curve_sheets_record_and_a_loadable_export(tiny: Path, tmp_path: Path) -> None:
    assert run_script(tiny) == 0
    run = tmp_path / "run"
    assert [line["step"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4]
    assert {"loss", "lr", "samples_per_second", "seconds", "gradient_norm"} <= log_of(run)[0].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((run / "sheets").iterdir())] == ["step-00000002.txt", "step-00000004.txt"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["step"], record["settings"]["batch_size"]) == (3, 4, 4)
    assert torch.__version__.startswith(record["calls"][0]["versions"]["torch"].partition("+")[0])
    assert (run / "export" / "text_encoder" / "model.safetensors").exists()
    assert not list((run / "export").rglob("*.bin"))


def test_the_exported_encoder_is_the_averaged_encoder_of_training(tiny: Path, tmp_path: Path) -> None:
    settings = load_settings(tiny, "text", text_stage.TextStageSettings, {})
    stage = text_stage.TextStage(settings, torch.device("cpu"))
    stage.model.eval()
    stage.export(tmp_path / "pipeline")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "pipeline" / "text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "pipeline" / "tokenizer")
    inputs = tokenizer(["A red star!", "two blue rings above it"], padding="max_length", return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 200)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 6]
    assert inputs["input_ids"][0, 3].item() == 1 and inputs["input_ids"][0, 4].item() == 0
    with torch.no_grad():
        exported = encoder(**inputs).last_hidden_state
        trained = stage.model.encoder(**inputs).last_hidden_state
    assert torch.equal(exported, trained)


def test_the_tokenizer_ignores_case_accents_and_punctuation_and_marks_unknown_words() -> None:
    tokenizer = text_stage.make_tokenizer(VOCABULARY)
    plain = tokenizer("a red star on a blue background")["input_ids"]
    assert tokenizer("  A R\u00e9d, star; on a (blue) Background!!")["input_ids"] == plain
    assert tokenizer("a zebra")["input_ids"][1:] == [2, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 200


def test_strangers_wording_keeps_every_word_that_carries_meaning_in_order() -> None:
    tokenizer = text_stage.make_tokenizer(VOCABULARY)
    caption = "a picture of two small red stars above a large blue ring"
    ids = tokenizer(caption)["input_ids"]
    fillers = frozenset(tokenizer("a picture of")["input_ids"][:-1])
    meaning = [token for token in ids if token not in fillers]
    for seed in range(50):
        changed = text_stage.perturb(ids, fillers, [2], numpy.random.default_rng(seed))
        assert [token for token in changed if token not in fillers | {2}] == meaning


def test_a_canonical_form_is_its_three_clauses_joined() -> None:
    for seed in range(300):
        rng = numpy.random.default_rng(seed)
        _, canonical = describe(sample_scene(rng), rng)
        clauses = text_stage.split(canonical)
        assert text_stage.join(list(clauses)) == canonical
    assert text_stage.split("one red star ; background any") == ("one red star", "", "any")


def test_greedy_decoding_says_what_the_labels_of_an_overfitted_caption_say(tiny: Path) -> None:
    settings = load_settings(tiny, "text", text_stage.TextStageSettings, {"data.scenes": 1, "data.perturbed": 0.0})
    stage = text_stage.TextStage(settings, torch.device("cpu"))
    batch = stage.batch(0, 0, 1)
    optimizer = torch.optim.Adam(stage.model.parameters(), lr=0.02)
    for _ in range(80):
        loss, _ = stage.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words = {index: word for word, index in stage.vocabulary.items()}
    caption = " ".join(words[token] for token in batch["input_ids"][0].tolist() if token > 2)
    wanted = [" ".join(words[token] for token in row if token > 1) for row in batch["labels"].tolist()]
    assert stage.translate([caption]) == [text_stage.join(wanted)]


def test_batches_depend_on_seed_rank_and_step_only(tiny: Path) -> None:
    settings = load_settings(tiny, "text", text_stage.TextStageSettings, {})
    first = text_stage.TextStage(settings, torch.device("cpu"))
    second = text_stage.TextStage(settings, torch.device("cpu"))
    second.batch(0, 0, 4)
    assert_same(first.batch(7, 0, 4), second.batch(7, 0, 4))
    for step, rank in ((8, 0), (7, 1)):
        other = first.batch(step, rank, 4)["input_ids"]
        assert other.shape != first.batch(7, 0, 4)["input_ids"].shape or not torch.equal(
            other, first.batch(7, 0, 4)["input_ids"]
        )


def test_generators_of_different_seeds_differ_even_when_the_sums_agree() -> None:
    assert torch.rand(1, generator=torch_generator(1, 2)) != torch.rand(1, generator=torch_generator(2, 1))
    assert numpy_generator(1, 2).random() != numpy_generator(2, 1).random()
    assert torch.equal(torch.rand(3, generator=torch_generator(1, 2)), torch.rand(3, generator=torch_generator(1, 2)))


def test_signals_are_given_back_even_when_training_fails() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="disk"), stop_signals():
        raise OSError("disk full")
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_stop_signal_saves_the_step_in_progress_and_the_run_can_go_on(tiny: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"

    def stop_after_the_first_step() -> None:
        while not (log.exists() and log.read_text(encoding="utf-8")):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop_after_the_first_step)
    thread.start()
    run_script(tiny, "--steps", "100000", "--set", "sheet_every=0", "--set", "checkpoint_every=0")
    thread.join()
    state = load_checkpoint(run)
    assert 1 <= state["step"] < 100000
    assert not (run / "export").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_minutes_limit_saves_and_stops(tiny: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    run_script(tiny, "--steps", "100000", "--max-minutes", "0.01", "--set", "sheet_every=0")
    assert time.monotonic() - begin < 60
    assert 1 <= load_checkpoint(tmp_path / "run")["step"] < 100000


def test_export_only_writes_the_components_of_the_newest_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script(tiny, "--export-only")
    assert stopped.value.code == 2 and "has no checkpoint" in capsys.readouterr().err
    run_script(tiny)
    weights = tmp_path / "run" / "export" / "text_encoder" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    assert run_script(tiny, "--export-only") == 0
    assert weights.read_bytes() == expected


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / "unfinished-checkpoint" / "state.pt").write_bytes(b"cut off")
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000010", "checkpoint-00000100"]
    assert load_checkpoint(tmp_path) == {"step": 100}


def test_the_learning_rate_warms_up_holds_and_decays_to_zero() -> None:
    settings = {"lr": 2.0, "warmup": 10, "hold": 0.5, "decay": "linear", "steps": 100}
    rates = [warmup_hold_decay(step, **settings) for step in range(101)]
    assert rates[0] == pytest.approx(2 / 11) and rates[10] == 2 == rates[55]
    assert rates[100] == 0 and all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    settings |= {"decay": "cosine", "hold": 0.0}
    assert warmup_hold_decay(55, **settings) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepps=3", "stepps is not a setting; nearest: steps"),
        ("model.d_mode=3", "d_mode is not a setting; nearest: d_model"),
        ("steps=0", "steps=0 must be at least 1"),
        ("lr=-1", "lr=-1.0 must be above 0"),
        ("batch_size=many", "batch_size='many' must be of type int"),
        ("decay=cosin", "nearest: 'cosine'"),
        ("mixed_precision=fp16", "must be one of no, bf16"),
        ("lr", "must be NAME=VALUE"),
    ],
)
def test_a_bad_setting_is_one_clear_line_and_exit_code_2(
    tiny: Path, tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script(tiny, "--set", setting)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_numbers_that_yaml_reads_as_text_become_floats(tiny: Path) -> None:
    assert load_settings(tiny, "text", text_stage.TextStageSettings, {"lr": "1e-3", "betas": [0.9, 1]}).lr == 1e-3


def test_every_section_of_the_committed_config_is_valid() -> None:
    path = ROOT / "scripts" / "configs" / "shapes.yaml"
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sections.keys() <= train.STAGES.keys()
    for name in sections:
        load_settings(path, name, train.STAGES[name].settings_type, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"], 1),
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
    ],
    ids=["accelerate on one process", "torchrun on two processes"],
)
def test_the_launchers_run_the_script(tiny: Path, tmp_path: Path, launcher: list[str], processes: int) -> None:
    words = ["-m", *launcher, "-m", "scripts.train", "--config", tiny, "--stage", "text"]
    done = run(words, ACCELERATE_USE_CPU="true")  # the launcher is a fork, what it starts are real interpreters
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    assert load_checkpoint(folder)["step"] == 4
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["calls"][0]["processes"] == processes
    assert [line["step"] for line in log_of(folder) if "loss" in line] == [1, 2, 3, 4]
