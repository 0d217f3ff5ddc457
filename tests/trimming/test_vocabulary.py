"""A smaller vocabulary: the same tokens and bits for texts of kept pieces, and tokens for any other text."""

import copy
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sensibert.core.errors import SensibertError
from sensibert.saving.folder import load
from sensibert.trimming.vocabulary import trim_vocabulary
from tests import runs
from tests.helpers import tiny_model

WORDS = "the film was great and dull who wrote it lives in works naïve cafés zebra quartz unbelievable".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def texts(seed, words=WORDS, count=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def with_suffix():
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    return made, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>")


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")


def word_pieces():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)


def tokenizer_of(kind):
    made, trainer = kind()
    made.train_from_iterator(texts(0, count=400), trainer)
    ends = [(name, made.token_to_id(name)) for name in ("</s>", "<s>")]
    made.post_processor = (
        processors.RobertaProcessing(*ends) if kind is byte_level else processors.BertProcessing(*ends)
    )
    names = {f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("kind", [byte_level, with_suffix, unigram, word_pieces])
def test_texts_of_kept_pieces_keep_their_tokens_and_their_bits(kind):
    old, few = tokenizer_of(kind), texts(1, WORDS[:9])
    model = tiny_model(vocab_size=len(old), initializer_range=0.2)
    before = copy.deepcopy(model)
    new = trim_vocabulary(model, old, few)
    left = set(new.get_vocab())
    assert model.config.vocab_size == len(new) == model.get_input_embeddings().num_embeddings < len(old)
    same = [text for text in (*few, *texts(2)) if {*pieces(old, text)} <= left]
    assert len(same) > len(few)
    for text in same:
        assert pieces(new, text) == pieces(old, text)
        whole, small = old(text, return_tensors="pt"), new(text, return_tensors="pt")
        assert torch.equal(model(**small).logits, before(**whole).logits)
    for text in (*texts(3), "zzz qqq?! ümläut"):  # any text still has tokens, and means what it meant
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True) == old.decode(
            old(text)["input_ids"], skip_special_tokens=True
        )
    assert [new.convert_tokens_to_ids(token) for token in SPECIAL] == sorted(
        new.convert_tokens_to_ids(token) for token in SPECIAL
    )
    assert new(few[0])["input_ids"][0] == new.bos_token_id and new.pad_token == "<pad>"


def template(sep, cls):
    return processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[sep, cls])


def sequence(sep, cls):
    return processors.Sequence([processors.ByteLevel(), template(sep, cls)])


@pytest.mark.parametrize(
    "post_processor", [template, sequence, processors.BertProcessing, processors.RobertaProcessing]
)
def test_special_tokens_at_the_end_are_renumbered_in_the_config_too(post_processor):
    made, trainer = word_pieces()
    made.train_from_iterator(texts(0, count=400), trainers.WordPieceTrainer(vocab_size=190, special_tokens=["<unk>"]))
    made.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    ends = [(name, made.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    made.post_processor = post_processor(*ends)
    old = PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    model = tiny_model(
        "modernbert", vocab_size=len(old), pad_token_id=old.pad_token_id, cls_token_id=old.cls_token_id,
        sep_token_id=old.sep_token_id, bos_token_id=old.cls_token_id, eos_token_id=old.sep_token_id,
    )  # fmt: skip
    before, few = copy.deepcopy(model), texts(1, WORDS[:6])
    old.backend_tokenizer.enable_padding(pad_id=old.pad_token_id, pad_token="[PAD]")  # as a call with padding leaves it
    new = trim_vocabulary(model, old, few)
    assert json.loads(new.backend_tokenizer.to_str())["padding"]["pad_id"] == new.pad_token_id
    assert new.pad_token_id < old.pad_token_id and model.config.pad_token_id == new.pad_token_id
    assert model.get_input_embeddings().padding_idx == new.pad_token_id
    assert (model.config.cls_token_id, model.config.sep_token_id) == (new.cls_token_id, new.sep_token_id)
    whole, small = (t(few[:8], padding=True, return_tensors="pt") for t in (old, new))
    for batch in (whole, small):
        batch.pop("token_type_ids", None)
    assert torch.equal(model(**small).logits, before(**whole).logits)


def test_the_unknown_piece_of_unigram_is_renumbered():
    pieces = ["\u2581", "\u2581good", "\u2581bad", *"goodba", "<unk>"]
    pieces = list(dict.fromkeys(pieces))
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=pieces.index("<unk>")))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    old = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    new = trim_vocabulary(tiny_model(head="", vocab_size=len(old)), old, ["good"])
    assert new.unk_token_id < old.unk_token_id
    assert new("good 7")["input_ids"][-1] == new.unk_token_id


def test_positions_that_count_from_the_padding_token_are_not_moved():
    made, trainer = word_pieces()
    made.train_from_iterator(texts(0, count=400), trainers.WordPieceTrainer(vocab_size=190, special_tokens=["<unk>"]))
    made.add_special_tokens(["<pad>"])
    old = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    model = tiny_model("roberta", vocab_size=len(old), pad_token_id=old.pad_token_id, max_position_embeddings=300)
    weights = model.get_input_embeddings().weight
    with pytest.raises(SensibertError, match="positions of this model count from its padding token"):
        trim_vocabulary(model, old, texts(1, WORDS[:3]))
    assert model.get_input_embeddings().weight is weights and model.config.vocab_size == len(old)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"texts": []}, "texts is empty, want at least one"),
        ({"texts": ["good", 3]}, "a text is 3, want str"),
        ({"head": "MaskedLM"}, "BertForMaskedLM has a head over the vocabulary, want another"),
        ({"vocab_size": 8}, "tokens, want at most 8, the rows of the model's embeddings"),
    ],
)
def test_bad_input_is_refused_and_the_model_unchanged(change, message):
    old = tokenizer_of(word_pieces)
    model = tiny_model(head=change.get("head", ""), vocab_size=change.get("vocab_size", len(old)))
    rows = model.config.vocab_size
    with pytest.raises(SensibertError, match=message):
        trim_vocabulary(model, old, change.get("texts", ["good"]))
    assert model.config.vocab_size == rows == model.get_input_embeddings().num_embeddings


def test_words_without_pieces_are_refused():
    made = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    old = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(SensibertError, match="tokenizer is of the kind WordLevel, want a fast one of WordPiece, BPE, "):
        trim_vocabulary(tiny_model(vocab_size=2), old, ["a"])


def test_other_embeddings_than_a_table_are_refused():
    old = tokenizer_of(word_pieces)
    model = tiny_model(head="", vocab_size=len(old))
    model.set_input_embeddings(torch.nn.EmbeddingBag(len(old), model.config.hidden_size))
    with pytest.raises(SensibertError, match=r"the embeddings are .*EmbeddingBag.*, want nn\.Embedding"):
        trim_vocabulary(model, old, ["good"])


def test_the_command_writes_a_folder_that_loads_and_is_trimmed_further(tmp_path):
    model = runs.model_folder(tmp_path / "model", head="SequenceClassification")
    (tmp_path / "texts.txt").write_text("the film was good\nwho wrote it\n")
    arguments = ("trim", "--model", model, "--vocabulary", tmp_path / "texts.txt", "--output", tmp_path / "out")
    assert runs.command(*arguments, "--dry-run").code == 0 and not (tmp_path / "out").exists()
    done = runs.command(*arguments, "--json")
    assert done.code == 0 and done.json["vocabulary_after"] < done.json["vocabulary_before"]
    (small, tokenizer), (whole, old) = load(tmp_path / "out"), load(model)
    assert done.json["total_params_after"] == sum(p.numel() for p in small.parameters())
    batch, wanted = (t("the film was good", return_tensors="pt") for t in (tokenizer, old))
    assert torch.equal(small(**batch).logits, whole(**wanted).logits)
    again = runs.command(
        *("trim", "--model", tmp_path / "out", "--train-file", runs.sentence_file(tmp_path / "train.csv")),
        *("--budget", "50%params", "--output", tmp_path / "smaller"),
    )
    assert again.code == 0 and load(tmp_path / "smaller")[0].config.vocab_size == len(tokenizer)
    both = runs.command(*arguments, "--budget", "50%params")
    assert both.code == 2 and "budget and vocabulary are both given, want one of them" in both.err
    missing = runs.command("trim", "--model", model, "--vocabulary", "no.txt", "--output", tmp_path / "x")
    assert missing.code == 2 and "vocabulary: no.txt: no such file" in missing.err
