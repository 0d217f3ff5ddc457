"""The HTML page about a model: complete in itself, with the numbers of the run."""

from html.parser import HTMLParser

import pytest

from sensibert.models import layout_of
from sensibert.report.page import page
from sensibert.report.plots import role
from tests import runs
from tests.helpers import tiny_model
from tests.report.small import MOMENTS, RESULT, ranked

VOID = {"meta", "br", "rect", "line", "polyline", "circle"}


class Reader(HTMLParser):
    """The text and tags of a page; fails where tags are not closed in their order, and on anything from elsewhere."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe") and not {"src", "href"} & dict(attributes).keys()
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(source):
    reader = Reader(source)
    return reader, " ".join(" ".join(reader.text).split())


def facts(**changed):
    rows = [{"layer": 0, "heads": 3, "heads_of": 4, "ffn": 32, "ffn_of": 64}, {"layer": 1, "ffn": 0, "ffn_of": 64}]
    known = {"model": "runs/<small>", "family": "bert", "seed": 7, "steps": 1234, "layers": rows, "tensors": []}
    return RESULT | known | {"seconds": {"warm": 2.0, "recover": 3.0, "total": 5.5}} | changed


def test_a_page_has_the_numbers_of_the_run_and_fetches_nothing():
    reader, text = read(page(facts(warnings=["a & b"]), megabytes=69.54))
    for shown in (
        *("<small>", "bert, text-classification: trimmed to 50%params by fisher, 1,234 steps, seed 7", "69.5 MB"),
        *("0.9000 accuracy 0.9500 just before the cut", "50.0 % of the encoder parameters 500.0K of 1.0M"),
        *("3 of 4", "32 of 64", "0 of 64", "1,000,000 500,000 50.0 %", "f1 - 0.8000", "of 5.5 s", "a & b"),
        *('pipeline("text-classification", "runs/<small>")', "--config runs/<small>/recipe.json"),
    ):
        assert shown in text, shown
    assert "Sensitivity" not in text and "Predicted" not in text
    widths = [float(a["width"]) for tag, a in reader.tags if tag == "rect" and a["fill"] == "var(--main)"]
    assert widths[:3] == [75, 50, 0]


def test_a_page_asks_a_model_of_several_labels_for_all_of_them():
    assert (
        'pipeline("text-classification", "runs/<small>", top_k=None)'
        in read(page(facts(task="multi-label-classification")))[1]
    )


def test_tensors_and_curves_are_drawn_where_a_sensitivity_has_them():
    scores = ranked(layout_of(tiny_model()))
    reader, text = read(page(facts(), scores))
    first = next(iter(scores.tensors))
    assert f"1 {role(first)} 0 1.00e+00" in text and "layer 1" in text and "Predicted" not in text
    assert "From the most to the least sensitive: rank" in text and "12 " in text
    scores.curves.update(
        {site.name: [(0, 0.0), (site.units, -0.5 if site.layer else 0.2)] for site in scores.layout.sites}
    )
    reader, text = read(page(facts(), scores))
    assert "Predicted rise of the loss" in text
    lines = [a["points"].split() for tag, a in reader.tags if tag == "polyline"]
    ends = [float(points[-1].partition(",")[2]) for points in lines]
    assert len(lines) == 4 and ends[0] < ends[1] == 200  # a fall is on the lower edge


def test_of_many_tensors_both_ends_of_the_ranking_are_shown():
    scores = ranked(layout_of(tiny_model(num_hidden_layers=6)))
    _, text = read(page(facts(), scores))
    most, least = text.split("The most sensitive:")[1].split("The least sensitive:")
    names = list(scores.tensors)
    assert f" 1 {role(names[0])} 0 " in most and f" 10 {role(names[9])} " in most and " 11 " not in most
    assert f" 27 {role(names[26])} " in least and f" 36 {role(names[35])} 5 " in least


def test_a_run_is_drawn_with_its_cut():
    reader, text = read(page(facts(), moments=MOMENTS))
    assert "The run Dotted lines are cuts." in text and "encoder parameters left, by step" in text
    dotted = {(a["x1"], a["x2"]) for tag, a in reader.tags if tag == "line" and "stroke-dasharray" in a}
    assert dotted == {("216.0", "216.0")}  # half of the width
    lines = [a["points"] for tag, a in reader.tags if tag == "polyline"]
    assert len(lines) == 3 and lines[1] == "216.0,10.0 388.0,112.0"  # the score at the cut and at the end
    _, text = read(page(facts(metrics=None), moments=[m._replace(score=None) for m in MOMENTS]))
    assert "training loss, by step" in text and "score" not in text
    assert "The run" not in read(page(facts()))[1]


def test_latencies_of_the_result_are_among_the_sizes():
    times = {"threads": 1, "length": 128, "batch_1_ms": {"before": 20.0, "after": 11.0}}
    _, text = read(page(facts(latency=times)))
    assert "latency of 1 x 128 tokens 20.0 ms 11.0 ms 55.0 %" in text and "latency" not in read(page(facts()))[1]


def test_what_a_budget_of_size_was_divided_by_is_on_the_page():
    form = {"vocabulary": None, "mb_saved": 45.0, "heads_and_neurons": 0.9, "loss": 0.01, "chosen": True}
    size = {"rows": 40, "of": "validation", "loss_before": 0.7, "forms": [{"weights": "fp16", **form}]}
    full = {"accuracy": 0.91}
    _, text = read(page(facts(weights="fp16", size=size, metrics_in_full=full), megabytes=45.5))
    assert "45.5 MB weights file in fp16" in text
    assert "weights in fp16, all pieces: 90 % of heads and neurons, loss +0.01, chosen" in text
    assert "before the file was made smaller: accuracy 0.9100" in text


def test_with_a_baseline_the_model_stands_beside_it():
    times = {"threads": 1, "length": 128, "batch_1_ms": {"before": 20.0, "after": 5.0}}
    reader, text = read(page(facts(metrics_baseline={"accuracy": 0.95}, latency=times)))
    assert "accuracy against encoder parameters" in text and "accuracy against latency of 1 x 128 tokens, ms" in text
    assert [float(a["cx"]) for tag, a in reader.tags if tag == "circle"] == [216.0, 130.0]  # half, and a quarter
    assert len([1 for tag, a in reader.tags if tag == "rect" and a["width"] == "8"]) == 2
    assert "against" not in read(page(facts(latency=times)))[1]


@pytest.mark.parametrize("missing", ["metrics", "seconds", "budget", "steps", "task"])
def test_what_a_folder_does_not_tell_is_left_out(missing):
    _, text = read(page(facts(**{missing: None})))
    assert "None" not in text and "What was cut" in text


def test_a_grid_shows_what_is_left_of_every_weight():
    _, text = read(page(facts(tensors=[{"tensor": "a.weight", "kept": 1024, "of": 4096}])))
    assert "a.weight 1,024 of 4,096" in text


def test_the_command_writes_the_page_of_a_run(tmp_path, monkeypatch):
    model, train = runs.model_folder(tmp_path / "model"), runs.sentence_file(tmp_path / "train.csv")
    out = tmp_path / "out"
    arguments = ("finetune", "--model", model, "--train-file", train, "--epochs", 1, "--output", out)
    assert runs.command(*arguments, "--budget", "50%params").code == 0
    done = runs.command("report", out, "--json")
    assert done.code == 0 and done.json["output"] == str(out / "report" / "report.html")
    _, text = read((out / "report" / "report.html").read_text(encoding="utf-8"))
    assert "trimmed to 50%params by obs" in text and "Predicted rise of the loss" in text and " MB" in text
    assert "The run Dotted lines are cuts." in text and "training loss, by step" in text
    (out / "report" / "run.csv").write_text("step\n1\n")
    damaged = runs.command("report", out)
    assert damaged.code == 2 and "run.csv: cannot be read (columns are step, want step, event" in damaged.err
    (out / "report" / "run.csv").unlink()  # as in a folder of an earlier version
    elsewhere = runs.command("report", out, "--output", tmp_path / "page.html")
    assert elsewhere.code == 0 and (tmp_path / "page.html").exists()
    # It belongs to the model: another run in its place does not keep it, even if it draws nothing.
    monkeypatch.setattr("sensibert.run_output.write_report", lambda *args: [])
    assert runs.command(*arguments, "--budget", "75%params", "--overwrite").code == 0
    assert not (out / "report" / "report.html").exists()


def test_bad_input_is_refused_in_words(tmp_path):
    done = runs.command("report", tmp_path / "missing")
    assert done.code == 2 and "folder: " in done.err
    model = runs.model_folder(tmp_path / "model", head="SequenceClassification")
    done = runs.command("report", model, "--output", tmp_path / "no" / "page.html")
    assert done.code == 2 and "page.html" in done.err and not (tmp_path / "no").exists()
