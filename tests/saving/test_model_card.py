"""The README.md of an exported folder: sizes, origin, and how to load it."""

from sensibert import export, trim
from sensibert.models import layout_of
from tests.helpers import tiny_model
from tests.plans import random_plan


def test_the_card_has_sizes_origin_and_both_ways_of_loading(tmp_path):
    model = tiny_model(head="QuestionAnswering")
    before = layout_of(model)
    trim(model, random_plan(before))
    after = layout_of(model)
    export(model, tmp_path / "small", info={"budget": "50%params"})
    card = (tmp_path / "small" / "README.md").read_text()
    assert "# small" in card and "BertForQuestionAnswering" in card and "AutoModelForQuestionAnswering" in card
    assert "import sensibert" in card and 'from_pretrained("small", trust_remote_code=True)' in card
    share = after.encoder_params / before.encoder_params
    assert f"| {after.encoder_params:,} | {before.encoder_params:,} ({100 * share:.1f} % left) |" in card
    assert f"| {after.total_params:,} | {before.total_params:,} |" in card
    assert "Budget: 50%params. Method: random." in card, "info goes before what the plan says, which fills in the rest"
