"""The text stage: tokenizer, wording, canonical forms, translation and export."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from scripts.datasets.shapes import VOCABULARY, describe, sample_scene
from scripts.embedded_models import text_stage


def tiny_stage(folder: Path, **data) -> text_stage.TextStage:
    """A stage of a small model, with 40 scenes by default."""
    settings = text_stage.TextStageSettings(
        output_dir=str(folder),
        seed=3,
        steps=4,
        batch_size=4,
        warmup=1,
        model=text_stage.TextModelSettings(d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1),
        data=text_stage.TextDataSettings(**{"scenes": 40, **data}),
    )
    return text_stage.TextStage(settings, torch.device("cpu"))


def test_the_tokenizer_ignores_case_accents_and_punctuation_and_marks_unknown_words() -> None:
    tokenizer = text_stage.make_tokenizer(VOCABULARY)
    plain = tokenizer("a red star on a blue background")["input_ids"]
    assert tokenizer("  A R\u00e9d, star; on a (blue) Background!!")["input_ids"] == plain
    assert tokenizer("a zebra")["input_ids"][1:] == [2, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 200


def test_unusual_wording_keeps_every_word_that_carries_meaning_in_order() -> None:
    tokenizer = text_stage.make_tokenizer(VOCABULARY)
    caption = "a picture of two small red stars above a large blue ring"
    ids = tokenizer(caption)["input_ids"]
    fillers = frozenset(tokenizer("a picture of")["input_ids"][:-1])
    meaning = [token for token in ids if token not in fillers]
    for seed in range(50):
        changed = text_stage.perturb(ids, fillers, [2], np.random.default_rng(seed))
        assert [token for token in changed if token not in fillers | {2}] == meaning


def test_a_canonical_form_is_its_three_clauses_joined() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        _, canonical = describe(sample_scene(rng), rng)
        clauses = text_stage.split(canonical)
        assert text_stage.join(list(clauses)) == canonical
    assert text_stage.split("one red star ; background any") == ("one red star", "", "any")


def test_the_exported_encoder_is_that_of_training(tmp_path: Path) -> None:
    stage = tiny_stage(tmp_path)
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


@pytest.mark.slow
def test_translation_gives_the_labels_of_an_overfitted_caption(tmp_path: Path) -> None:
    stage = tiny_stage(tmp_path, scenes=1, perturbed=0.0)
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


def test_batches_depend_on_seed_rank_and_step_only(tmp_path: Path) -> None:
    first, second = tiny_stage(tmp_path), tiny_stage(tmp_path)
    second.batch(0, 0, 4)
    batch, same = first.batch(7, 0, 4), second.batch(7, 0, 4)
    assert batch.keys() == same.keys() and all(torch.equal(batch[name], same[name]) for name in batch)
    for step, rank in ((8, 0), (7, 1)):
        other = first.batch(step, rank, 4)["input_ids"]
        assert other.shape != first.batch(7, 0, 4)["input_ids"].shape or not torch.equal(
            other, first.batch(7, 0, 4)["input_ids"]
        )
