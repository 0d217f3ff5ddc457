"""The README.md of an exported folder: sizes, origin, and how to load it."""

import json

import pytest
from huggingface_hub import metadata_load

from sensibert import export, load, trim
from sensibert.models import layout_of
from tests.data.tiny import word_piece
from tests.helpers import tiny_model
from tests.plans import random_plan


def test_the_card_has_sizes_origin_and_both_ways_of_loading(tmp_path):
    model = tiny_model(head="QuestionAnswering")
    before = layout_of(model)
    trim(model, random_plan(before))
    after = layout_of(model)
    export(model, tmp_path / "small", word_piece(), info={"budget": "50%params"})
    card = (tmp_path / "small" / "README.md").read_text()
    assert "# small" in card and "BertForQuestionAnswering" in card and "AutoModelForQuestionAnswering" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("small")\n' in card
    assert "import sensibert" in card and 'from_pretrained("small", trust_remote_code=True)' in card
    share = after.encoder_params / before.encoder_params
    assert f"| {after.encoder_params:,} | {before.encoder_params:,} ({100 * share:.1f} % left) |" in card
    assert f"| {after.total_params:,} | {before.total_params:,} |" in card
    assert "| data type of the weights | float32 |" in card
    assert "pipeline_tag: question-answering" in card and "Scores" not in card and "base_model:" not in card
    assert "Budget: 50%params. Method: random." in card, "info goes before what the plan says, which fills in the rest"


def test_scores_data_and_base_model_are_on_the_card_of_a_run_and_nowhere_else(tmp_path):
    model = tiny_model()
    trim(model, random_plan(layout_of(model)))
    told = {"metrics": {"accuracy": 0.91234}, "base_model": "google/bert", "validation_data": "dev.csv", "task": "t"}
    export(model, tmp_path / "small", info=told)
    lines = (tmp_path / "small" / "README.md").read_text().splitlines()
    assert "base_model: google/bert" in lines[:6] and "| accuracy | 0.9123 |" in lines
    assert "Data (validation: dev.csv)." in lines
    entry = json.loads((tmp_path / "small" / "config.json").read_text())["sensibert"]
    assert entry["task"] == "t" and not (set(told) - {"task"}) & entry.keys()
    again, _ = load(tmp_path / "small")  # trimmed further, the scores would no longer be true
    export(again, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "accuracy" not in card and "okenizer" not in card, "this folder has none"


OTHER, LINK = "license: other\nlicense_name: own\nlicense_link: ", "https://example.org/own"


@pytest.mark.parametrize(
    "front,stated",
    [
        ("license: apache-2.0\ntags: [a]\n", {"license": "apache-2.0"}),
        (OTHER + LINK, {"license": "other", "license_name": "own", "license_link": LINK}),
        (OTHER + "LICENSE", {"license": "other", "license_name": "own"}),
        ("license: mit\nlicense_name: own", {"license": "mit"}),
        ("license: [mit\n", {}),
        ("license: 7", {}),
        ("language: en", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_that_the_card_of_the_base_model_states(tmp_path, front, stated):
    tiny_model().save_pretrained(tmp_path / "base")
    if front is not None:
        (tmp_path / "base" / "README.md").write_text(f"---\n{front}\n---\n# base\nlicense: gpl\n")
    source = tmp_path / "base"
    for name in ("small", "smaller"):  # trimmed again, too
        model = load(source)[0]
        trim(model, random_plan(layout_of(model)))
        source = export(model, tmp_path / name)
        found = metadata_load(source / "README.md")
        assert {key: value for key, value in found.items() if key.startswith("license")} == stated
