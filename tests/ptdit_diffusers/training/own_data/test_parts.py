"""New words of the text encoder, and the VAE on one's own pictures."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, T5EncoderModel

from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.core.vocabulary import OWN_CAPTIONS, data_set_of, refusal
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.data.encode import video
from ptdit_diffusers.training.data.media import read_frames
from ptdit_diffusers.training.own_data.card import card
from ptdit_diffusers.training.own_data.model import make_base
from ptdit_diffusers.training.own_data.prepare import prepare_parts
from ptdit_diffusers.training.own_data.settings import read_settings
from ptdit_diffusers.training.own_data.vae import reconstructions
from ptdit_diffusers.training.own_data.words import extend, unknown_words


def encoded(folder, caption: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        return encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state


def test_new_words_are_found_in_captions_as_the_tokenizer_splits_them():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path("shapes-128") / "tokenizer")
    found = unknown_words(tokenizer, ["A tabby, on a red CHAIR!", "a tabby above a blue circle"])
    assert found == {"tabby": 2, "chair": 1}


def test_a_larger_encoder_reads_known_captions_as_before_and_new_words_apart(tmp_path):
    start = embedded_model_path("shapes-128")
    extend(start / "tokenizer", start / "text_encoder", ["tabby", "chair"], tmp_path / "grown")
    known = "a large red circle above a blue square, white background"
    assert torch.equal(encoded(start, known), encoded(tmp_path / "grown", known))
    cats = [encoded(tmp_path / "grown", f"a red {word}") for word in ("tabby", "chair", "zebra")]
    assert not torch.allclose(cats[0], cats[1], atol=1e-2) and not torch.allclose(cats[0], cats[2], atol=1e-2)
    words = json.loads((tmp_path / "grown/tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(words.values()) == list(range(len(words)))
    assert OWN_CAPTIONS in words and data_set_of(words) is None  # the word list of shapes-128 is not asked any more
    assert refusal(words, "a dark tabby behind five chairs") is None


def test_growing_teaches_new_words_and_leaves_the_others_as_they_are(config, drawn, tmp_path):
    start = embedded_model_path("shapes-128")
    captions = ["a tabby on a red chair", "a ginger cat on a blue chair", "a tabby and a ginger cat"]
    data = tmp_path / "data"
    data.mkdir()
    for number, caption in enumerate(captions):
        (data / f"{number}.png").write_bytes((drawn / f"{number:04d}.png").read_bytes())
        (data / f"{number}.txt").write_text(caption, encoding="utf-8")
    path = config(
        "grown", data={"source": str(data)}, start="shapes-128", text={"grow": True, "steps": 80},
        stages=[{"resolution": 128, "steps": 1, "batch": 1, "lr": 1e-4}],
    )  # fmt: skip
    parts = prepare_parts(read_settings(path), Accelerator(cpu=True))
    folder = parts["tokenizer"].parent
    known = "a large red circle above a blue square, white background"
    assert torch.equal(encoded(start, known), encoded(folder, known))
    log = (tmp_path / "grown" / "text" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["words_guessed"] > 0.3  # chance is 1 / 316
    assert prepare_parts(read_settings(path), Accelerator(cpu=True)) == parts  # done once
    first = T5EncoderModel.from_pretrained(tmp_path / "grown" / "text" / "start" / "text_encoder").shared.weight
    last = T5EncoderModel.from_pretrained(folder / "text_encoder").shared.weight
    moved = (first != last).any(dim=1)
    assert not moved[:310].any() and moved[310:].sum() >= 5


def drawn_videos(drawn, count: int = 4) -> list[torch.Tensor]:
    return [video(read_frames(drawn / f"{number:04d}.png", 1)) for number in range(count)]


@pytest.mark.slow
def test_a_decoder_is_trained_further_and_reconstructs_better_from_the_same_latents(config, drawn, tmp_path):
    """The decoder of shapes-128 after its last layer was made too weak."""
    start = embedded_model_path("shapes-128")
    shutil.copytree(start, tmp_path / "weak")
    weak = AutoencoderKLOpenSoraPlan.from_pretrained(start / "vae")
    weak.decoder.conv_out.conv.weight.data *= 0.7
    weak.save_pretrained(tmp_path / "weak" / "vae")
    stages = [{"resolution": 128, "steps": 1, "batch": 1, "lr": 1e-4}]
    vae = {"train": "decoder", "steps": 60, "batch": 2, "crop": 64, "lr": 2e-3}
    settings = read_settings(config(vae=vae, start=str(tmp_path / "weak"), stages=stages))
    trained = AutoencoderKLOpenSoraPlan.from_pretrained(prepare_parts(settings, Accelerator(cpu=True))["vae"])
    pairs = zip(weak.encoder.parameters(), trained.encoder.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    before, after = (sum(reconstructions(each, drawn_videos(drawn))) / 4 for each in (weak, trained))
    assert after > before + 3, (before, after)
    assert trained.config.scaling_factor == weak.config.scaling_factor


def test_a_new_vae_learns_pictures_of_its_own_and_measures_its_scale(config, drawn, tiny_model_folder, tmp_path):
    pictures = tmp_path / "pictures"  # of its own
    pictures.mkdir()
    for number in range(8):
        (pictures / f"{number}.png").write_bytes((drawn / f"{number:04d}.png").read_bytes())
    vae = {"train": "new", "steps": 80, "batch": 2, "crop": 32, "lr": 1e-3, "hidden_size": 12, "source": str(pictures)}
    lines = [{"file_name": f"{i}.png", "text": "", "licence": "CC0" if i else "MIT"} for i in range(8)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = {"source": "nowhere", "licence_column": "licence"}
    settings = read_settings(config(vae=vae, start="new", base=str(tiny_model_folder), data=data))
    parts = prepare_parts(settings, Accelerator(cpu=True))
    log = [json.loads(line) for line in (tmp_path / "out/vae/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    base, before = make_base(settings, parts), make_base(settings)
    assert base.scaling_factor != before.scaling_factor
    assert base.fingerprint("vae") != before.fingerprint("vae") and base.config("vae")["hidden_size"] == 12
    text = card(settings, "cats", 12, "as they are")
    assert "- Other pictures, which the VAE was trained on: 8. Licences: CC0 (7), MIT (1)." in text
