"""Tokenizers made on the spot: WordPiece as BERT has it, byte-level BPE as RoBERTa has it. No files, no network."""

from string import ascii_lowercase, digits, punctuation

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the a film was good bad great dull who wrote it anna paris lives in works for acme and not".split()


def word_piece(model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """A few whole words; every other word falls into one piece a character. Gives token_type_ids."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(c for c in ascii_lowercase + digits if c not in WORDS)]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(f"##{c}" for c in ascii_lowercase + digits), *punctuation])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level(trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """The space before a word is part of its first piece, and there are no token_type_ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    cls, sep = ("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
