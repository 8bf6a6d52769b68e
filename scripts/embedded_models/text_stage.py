"""Stage "text": a small T5 learns to translate captions to the canonical form of the data set.

The encoder and the tokenizer become components of the pipeline. The decoder has one layer and writes each clause of
the canonical form by itself, given only the number of the clause, so that the encoder has to bind sizes, colors and
relations to the right words.
Shape letters: B batch, L caption tokens, T clause tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ptdit_diffusers.training.randomness import HELD_OUT_SEED, Stream, numpy_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task
from scripts.datasets.registry import DATA_SETS, find_data_set, pick_data_set

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
PAD, END, UNKNOWN = range(3)
CLAUSES = ("1", "2", "background")  # first words of the decoder: two relations (the second may be empty), background
FILLERS = frozenset(
    "a an the there is are of some picture image drawing photo show draw please scene you can we see".split()
)


@dataclass(kw_only=True)
class TextModelSettings:
    """Sizes of the T5; the decoder is used for training only."""

    d_model: int = 128
    d_kv: int = 32
    num_heads: int = 4
    d_ff: int = 512
    num_layers: int = 4
    num_decoder_layers: int = 1


@dataclass(kw_only=True)
class TextDataSettings:
    """Captions of training and of the report."""

    scenes: int = 60_000  # size of the pool of samples; each gets a new caption whenever it is taken
    start: str = ""  # diffusers folder whose encoder to go on from: its words keep their embeddings; "" = new weights
    worlds: dict[str, float] = field(default_factory=lambda: {"pictures": 1.0})  # share of the pool that each has
    keep_weight: float = 1.0  # with `start`: of the distance of picture captions' encodings from those of the start
    perturbed: float = 0.25  # share of captions with unusual wording: idle words added, fillers changed
    held_out_captions: int = 2000  # for the report


@dataclass(kw_only=True)
class TextStageSettings(LoopSettings):
    """Settings of the stage."""

    model: TextModelSettings = field(default_factory=TextModelSettings)
    data: TextDataSettings = field(default_factory=TextDataSettings)


class TextStage(Task):
    """Captions to canonical forms, text to text."""

    settings_type = TextStageSettings

    def __init__(self, settings: TextStageSettings, device: torch.device) -> None:
        self.settings, self.device, data = settings, device, settings.data
        self.tokenizer = make_tokenizer([word for name in data.worlds for word in find_data_set(name).vocabulary])
        self.vocabulary = self.tokenizer.get_vocab()
        self.fillers = frozenset(self.vocabulary[word] for word in FILLERS & self.vocabulary.keys())
        sizes = vars(settings.model)
        config = T5Config(
            vocab_size=len(self.vocabulary),
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            **sizes,
        )
        self.model = T5ForConditionalGeneration(config)
        prefer_neighbors(self.model)
        self.start = StartEncoder(data.start, self.model, self.vocabulary).to(device) if data.start else None
        self.model.to(device)
        self.pool = [self.sample(numpy_generator(settings.seed, Stream.TEXT_POOL, i)) for i in range(data.scenes)]
        self.idle = self.idle_words()
        self.held_out: list[tuple[str, str]] = []

    def sample(self, rng: np.random.Generator, held_out: bool = False) -> tuple[str, Any]:
        """Return the name of a data set, chosen by its share, and a sample of it."""
        name = pick_data_set(self.settings.data.worlds, rng.random())
        return name, DATA_SETS[name].sample(rng, held_out=held_out)

    @staticmethod
    def describe(sample: tuple[str, Any], rng: np.random.Generator) -> tuple[str, str]:
        """Return caption and canonical form."""
        name, content = sample
        return DATA_SETS[name].describe(content, rng)

    def idle_words(self, captions: int = 5000) -> list[int]:
        """Return ids to put between the words of a caption: words without use, and as often the unknown word."""
        rng = numpy_generator(self.settings.seed, Stream.TEXT_IDLE_WORDS)
        used = set(range(len(SPECIAL)))
        for i in rng.integers(len(self.pool), size=captions):
            caption, canonical = self.describe(self.pool[i], rng)
            used.update(self.tokenizer(caption)["input_ids"])
            used.update(*map(self.clause_ids, split(canonical)))
        unused = sorted(set(self.vocabulary.values()) - used)
        return unused + [UNKNOWN] * max(1, len(unused))

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        """Return input_ids, attention_mask (B, L), labels (3 B, T) with a row per clause, and pictures (B,).

        Labels are padded by -100; `pictures` is true where the sample is a picture.
        """
        rng = numpy_generator(self.settings.seed, Stream.TEXT_BATCH, rank, step)
        samples = [self.pool[i] for i in rng.integers(len(self.pool), size=batch_size)]
        pairs = [self.describe(sample, rng) for sample in samples]
        ids = self.tokenizer([caption for caption, _ in pairs])["input_ids"]
        perturbed = rng.random(batch_size) < self.settings.data.perturbed
        ids = [
            perturb(row, self.fillers, self.idle, rng) if change else row
            for row, change in zip(ids, perturbed, strict=True)
        ]
        input_ids = padded(ids, PAD)
        labels = padded([self.clause_ids(clause) for _, canonical in pairs for clause in split(canonical)], -100)
        pictures = torch.tensor([name == "pictures" for name, _ in samples])
        mask = (input_ids != PAD).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "pictures": pictures}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross entropy per canonical word, plus the distance from the start."""
        labels, mask = batch["labels"], batch["attention_mask"]
        captions = self.model.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        earlier = torch.cat([self.first_words(len(mask)), labels[:, :-1].clamp(min=PAD)], dim=1)
        output = self.model(
            encoder_outputs=BaseModelOutput(captions.repeat_interleave(len(CLAUSES), 0)),
            attention_mask=mask.repeat_interleave(len(CLAUSES), 0),
            decoder_input_ids=earlier,
            labels=labels,
        )
        right = (output.logits.argmax(-1) == labels)[labels != -100].float().mean()
        if self.start is None:
            return output.loss, {"word_accuracy": right.detach()}
        moved = self.start.distance(captions, batch["input_ids"], mask * batch["pictures"][:, None])
        numbers = {"word_accuracy": right.detach(), "moved": moved.detach()}
        return output.loss + self.settings.data.keep_weight * moved, numbers

    def first_words(self, captions: int) -> Tensor:
        """Return the decoder tokens (3 * captions, 1) that ask for each clause."""
        asked = torch.tensor([[self.vocabulary[word]] for word in CLAUSES], device=self.device)
        return asked.repeat(captions, 1)

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Return the share of held-out captions that are translated exactly; the wrong ones go to a file."""
        if not self.held_out:
            rng = numpy_generator(self.settings.seed, HELD_OUT_SEED)
            count = self.settings.data.held_out_captions
            self.held_out = [self.describe(self.sample(rng, held_out=True), rng) for _ in range(count)]
        translated = self.translate([caption for caption, _ in self.held_out])
        lines, right = [], 0
        for index, ((caption, canonical), words) in enumerate(zip(self.held_out, translated, strict=True)):
            right += words == canonical
            if index < 10 or words != canonical:
                lines += [f"caption:  {caption}", f"expected: {canonical}", f"found:    {words}", ""]
        accuracy = right / len(self.held_out)
        header = f"{right} of {len(self.held_out)} held-out captions are translated exactly ({accuracy:.2%})"
        path.with_suffix(".txt").write_text("\n".join([header, "", *lines]), encoding="utf-8")
        return {"held_out_exact": accuracy}

    @torch.no_grad()
    def translate(self, captions: list[str], longest: int = 24) -> list[str]:
        """Return the canonical forms of captions by greedy decoding, with at most `longest` words per clause."""
        self.model.eval()
        words = {index: word for word, index in self.vocabulary.items()}
        translated = []
        for begin in range(0, len(captions), 250):
            inputs = self.tokenizer(captions[begin : begin + 250], padding=True, return_tensors="pt").to(self.device)
            encoded = self.model.encoder(**inputs).last_hidden_state
            rows = self.greedy(encoded, inputs["attention_mask"], longest).tolist()
            clauses = [[words[token] for token in row[: (row + [END]).index(END)]] for row in rows]
            for first in range(0, len(clauses), len(CLAUSES)):
                translated.append(join([" ".join(clause) for clause in clauses[first : first + len(CLAUSES)]]))
        return translated

    def greedy(self, encoded: Tensor, mask: Tensor, longest: int) -> Tensor:
        """Return the likeliest next words, one after another: (3 B, <= longest) ids; ids after END mean nothing."""
        captions = BaseModelOutput(encoded.repeat_interleave(len(CLAUSES), 0))
        mask = mask.repeat_interleave(len(CLAUSES), 0)
        rows = self.first_words(len(encoded))
        while rows.shape[1] <= longest and not (rows == END).any(1).all():
            logits = self.model(encoder_outputs=captions, attention_mask=mask, decoder_input_ids=rows).logits
            rows = torch.cat([rows, logits[:, -1:].argmax(-1)], dim=1)
        return rows[:, 1:]

    def clause_ids(self, clause: str) -> list[int]:
        """Return the ids of the words of a clause, and END."""
        return [self.vocabulary[word] for word in clause.split()] + [END]

    def export(self, folder: Path) -> None:
        """Write text_encoder/ (fp32 safetensors) and tokenizer/."""
        config = T5Config(**{**self.model.config.to_dict(), "is_encoder_decoder": False, "use_cache": False})
        encoder = T5EncoderModel(config)
        encoder.load_state_dict(self.model.encoder.state_dict(prefix="encoder."), strict=False)
        encoder.shared.weight.data.copy_(self.model.shared.weight)
        encoder.float().save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


class StartEncoder(torch.nn.Module):
    """The text encoder to go on from: gives the new one its weights, and measures how far that has moved.

    Args:
        folder: Diffusers folder with text_encoder/ and tokenizer/.
        model: Gets the weights, and the embeddings of the words that both vocabularies have.
        vocabulary: Words of the new model and their ids.
    """

    def __init__(self, folder: str, model: T5ForConditionalGeneration, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.encoder = T5EncoderModel.from_pretrained(Path(folder) / "text_encoder").eval().requires_grad_(False)
        words = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer").get_vocab()
        earlier = torch.full((len(vocabulary),), UNKNOWN)
        for word, index in vocabulary.items():
            earlier[index] = words.get(word, UNKNOWN)
        self.register_buffer("earlier", earlier)  # id now -> id then
        blocks = {name: value for name, value in self.encoder.state_dict().items() if name.startswith("encoder.block")}
        blocks["encoder.final_layer_norm.weight"] = self.encoder.encoder.final_layer_norm.weight
        model.load_state_dict(blocks, strict=False)
        known = (earlier != UNKNOWN).nonzero().flatten()
        with torch.no_grad():
            model.shared.weight[known] = self.encoder.shared.weight[earlier[known]]
            model.shared.weight[UNKNOWN] = self.encoder.shared.weight[UNKNOWN]

    def distance(self, encoded: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean square change of encodings (B, L, D) where mask (B, L) is 1, over their mean square."""
        ids = self.earlier[input_ids]
        with torch.no_grad():
            before = self.encoder(ids, attention_mask=(input_ids != PAD).long()).last_hidden_state
        change = ((encoded - before) ** 2).mean(-1) * mask
        return change.sum() / ((before**2).mean(-1) * mask).sum().clamp(min=1e-6)


def prefer_neighbors(model: T5ForConditionalGeneration) -> None:
    """Start the heads with a bias towards near words: after, before, both, and none, in turn.

    The usual start is flat. Learning to attend to neighbors, which binds colors to shapes, then takes thousands of
    steps, because these few numbers move by no more than the learning rate per step.
    """
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        offsets = torch.tensor(sorted(range(-40, 41), key=abs, reverse=True))  # key position - query position
        buckets = attention._relative_position_bucket(
            offsets,
            bidirectional=not stack.config.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        weight = attention.relative_attention_bias.weight.data  # (buckets, heads)
        for offset, bucket in zip(
            offsets.tolist(), buckets.tolist(), strict=True
        ):  # the nearest offset of a bucket wins
            for head in range(weight.shape[1]):
                bias = -abs(offset) * (0.1 if head % 4 == 3 else 0.7)
                if (head % 4 == 0 and offset <= 0) or (head % 4 == 1 and offset >= 0):
                    bias -= 3.0
                weight[bucket, head] = max(bias, -6.0)


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per lower-case word; it drops accents and punctuation and appends </s>."""
    words = [*SPECIAL, *sorted({*vocabulary, ";"})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['\u2019]"), ""),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=200,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def split(canonical: str) -> tuple[str, str, str]:
    """Return first relation, second relation (may be empty) and background of a canonical form."""
    *relations, background = canonical.split(" ; ")
    first, second = [*relations, ""][:2]
    return first, second, background.removeprefix("background ")


def join(clauses: list[str]) -> str:
    """Return the canonical form of three clauses; the inverse of `split`."""
    first, second, background = clauses
    return " ; ".join([first, *([second] if second else []), f"background {background}"])


def perturb(ids: list[int], fillers: frozenset[int], idle: list[int], rng: np.random.Generator) -> list[int]:
    """Return unusual wording: some filler words dropped or replaced, idle words anywhere; the meaning stays.

    Args:
        ids: Word ids with the end token last.
        fillers: Ids that can be dropped without changing the meaning.
        idle: Ids to put in, chosen evenly.
    """
    changed = []
    for token, (fate, extra, which) in zip(ids, rng.random((len(ids), 3)).tolist(), strict=True):
        idle_word = idle[int(which * len(idle))]
        if extra < 0.06:
            changed.append(idle_word)
        if token not in fillers or fate >= 0.3:
            changed.append(token)
        elif fate < 0.1:
            changed.append(idle_word)
    return changed


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Return rows of different lengths as one integer tensor (B, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
