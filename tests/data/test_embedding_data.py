import numpy as np
import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.embedding_data import EmbeddingData, different_texts
from sensibert.data.files import Examples, load_examples
from sensibert.models.pooling import Pooling
from tests import runs

from .tiny import word_piece

TEXTS = [text for text, _ in runs.sentences(60)]


def examples(name="train.txt", **columns):
    return Examples(columns, name)


def pairs(rows=30, **changed):
    columns = {"sentence1": TEXTS[:rows], "sentence2": TEXTS[rows : 2 * rows], "score": [i % 5 for i in range(rows)]}
    return Examples({name: v for name, v in (columns | changed).items() if v is not None}, "dev.csv")


def build(train, validation=None, pooling=Pooling(), **options):
    return EmbeddingData.of_texts(train, validation, word_piece(), pooling, **options)


def texts_of(features):
    tokenizer = word_piece()
    return [tokenizer.decode(features[i]["input_ids"], skip_special_tokens=True) for i in range(len(features))]


def test_a_line_is_a_text(tmp_path):
    (tmp_path / "texts.txt").write_text('﻿the film\n\n a film \r\nwho, wrote "it"\n', encoding="utf-8")
    assert load_examples(str(tmp_path / "texts.txt")).columns == {"text": ["the film", "a film", 'who, wrote "it"']}


def test_every_text_counts_once_and_some_are_held_out():
    train = examples(anchor=TEXTS[:40], positive=TEXTS[20:60], negative=TEXTS[10:50], label=[0] * 40)
    data = build(train)
    learned, held = texts_of(data.train), texts_of(data.validation)
    assert sorted(learned + held) == sorted(set(TEXTS))
    assert len(held) == len(set(TEXTS)) // 10
    assert texts_of(build(train, seed=1).validation) != held == texts_of(build(train).validation)
    assert data.main_metric == "recall_at_10" and data.task.name == "embedding"


def test_rows_are_drawn_and_columns_chosen():
    train = examples(**{"a": TEXTS[:30], "b": TEXTS[30:], "a,b": TEXTS[:30]})
    assert len(build(train, text_column="b", rows=7).train) == 7
    assert set(texts_of(build(train, pairs(), text_column="b, a").train)) == set(TEXTS)
    assert set(texts_of(build(train, pairs(), text_column="a,b").train)) == set(TEXTS[:30])
    few = [texts_of(build(train, text_column="b", rows=7, seed=seed).train) for seed in (0, 1)]
    assert few[0] != few[1]


def test_prompts_lower_case_and_the_length_of_the_folder_hold():
    pooling = Pooling(prompts=("who ", "acme "), lower_case=True, max_length=5)
    train = examples(text=[text.upper() for text in TEXTS])
    data = build(train, pairs(), pooling)
    firsts = {text.split()[0] for text in texts_of(data.train)}
    assert firsts == {"who", "acme"} and {text.split()[0] for text in texts_of(data.validation)} == {"who"}
    assert max(data.train.lengths) == 5 == data.task.max_length
    assert build(train, pooling=pooling, max_length=9).task.max_length == 9
    assert build(train).task.max_length == 512


def test_metrics_compare_with_scores_and_with_the_original():
    first, second = TEXTS[:30], [TEXTS[0], *TEXTS[31:60]]
    data = build(examples(text=TEXTS), pairs(sentence1=first, sentence2=second))
    count = len(data.validation)
    assert count == len(set(first + second))
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    assert set(data.compute_metrics(vectors)) == {"spearman"}  # the original is not known yet
    known = data.with_labels(lambda texts: vectors[: len(texts)] if len(texts) == count else np.zeros((len(texts), 8)))
    same = known.compute_metrics(3 * vectors)
    assert same["recall_at_10"] == 1 and same["cosine"] == pytest.approx(1)
    assert same["spearman"] == data.compute_metrics(vectors)["spearman"]
    other = known.compute_metrics(np.random.default_rng(1).normal(size=(count, 8)))
    assert other["recall_at_10"] < 0.6 and abs(other["cosine"]) < 0.5
    rows = {text: i for i, text in enumerate(dict.fromkeys(first + second))}
    cosine = [
        float(np.dot(*(vectors[rows[t]] / np.linalg.norm(vectors[rows[t]]) for t in p))) for p in zip(first, second)
    ]
    known.pairs.scores[:] = np.argsort(np.argsort(cosine))
    assert known.compute_metrics(vectors)["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    "train, message",
    [
        (
            examples(text=["the same"] * 50),
            r"train_file: train.txt: all texts are 'the same' \(str\), want at least 20 diff",
        ),
        (examples(text=TEXTS[:5] * 9), "train.txt: 5 different texts, want at least 20 different ones"),
        (examples(text=[*TEXTS, " "]), "train.txt: row 61, column 'text' is empty"),
        (examples(text=[*TEXTS, None]), "train.txt: row 61, column 'text' is empty"),
        (examples(text=[*TEXTS, 3]), r"row 61, column 'text' is 3 \(int\), want text"),
        (
            examples(body=TEXTS),
            "no column with texts is known, the columns are 'body'; want text_column, or one of 'anchor'",
        ),
    ],
)
def test_texts_that_teach_nothing_are_refused(train, message):
    with pytest.raises(SensibertError, match=message):
        build(train)


def test_a_missing_column_is_named():
    with pytest.raises(SensibertError, match="train_file: text_column: train.txt: no column 'bod', .*did you mean"):
        build(examples(body=TEXTS), text_column="bod")


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"score": None},
            r"the columns are 'sentence1', 'sentence2', want two with texts \(.*\) and one with a score \('score",
        ),
        ({"sentence2": None}, "the columns are 'sentence1', 'score', want two with texts"),
        ({"score": [2.5] * 30}, r"column 'score' is 2.5 \(float\) in every row, want different scores"),
        ({"score": ["high"] * 30}, "column 'score' is 'high'"),
        ({"sentence1": [""] * 30}, "row 1, column 'sentence1' is empty"),
        ({"sentence1": ["a"] * 30, "sentence2": ["b"] * 30}, "dev.csv: 2 different texts, want at least 3"),
    ],
)
def test_a_validation_file_without_scored_pairs_is_refused(changed, message):
    with pytest.raises(SensibertError, match=f"validation_file: dev.csv: .*{message}|validation_file: {message}"):
        build(examples(text=TEXTS), pairs(**changed))


def test_columns_of_pairs_and_scores_may_be_named():
    named = Examples({"left": TEXTS[:30], "right": TEXTS[30:], "gold": list(range(30))}, "dev.csv")
    train = examples(left=TEXTS[:30], right=TEXTS[30:])
    data = build(train, named, text_column="left,right", label_column="gold")
    assert data.pairs.scores.tolist() == list(range(30)) and set(texts_of(data.train)) == set(TEXTS)
    assert different_texts(train, "right") == list(dict.fromkeys(TEXTS[30:]))
