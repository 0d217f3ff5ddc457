"""The HTML page about the models of several budgets, and what the commands say about their folder."""

import json

import pytest

from sensibert.core.errors import SensibertError
from sensibert.core.folder_facts import read_family
from sensibert.report.family_page import family_page
from sensibert.report.tables import family_table
from tests import runs
from tests.report.small import RESULT
from tests.report.test_page import read


def latency(after):
    return {"threads": 1, "length": 128, "batch_1_ms": {"before": 20.0, "after": after}}


def family(**changed):
    own = {"total_params_after": 2_500_000, "seconds": 10.0, "warnings": []}
    rows = [
        {"folder": "75-params", "budget": "75%params", "encoder_params_after": 750_000, "metrics": {"f1": 0.9}, **own},
        {"folder": "50-params", "budget": "50%params", "encoder_params_after": 500_000, "metrics": {"f1": 0.8}, **own},
    ]
    seconds = {"warm_up_and_analysis": 30.0, "baseline": 12.0, "total": 62.0}
    known = {name: RESULT[name] for name in ("task", "method", "encoder_params_before")} | {"seed": 7, "steps": 1234}
    return known | {"metric": "f1", "metrics_baseline": {"f1": 1.0}, "seconds": seconds, "rows": rows} | changed


MEMBERS = [{"latency": latency(15.0), "mb_after": 8.0}, {"latency": latency(10.0), "mb_after": 6.0}]


def circles(reader):
    return [(float(a["cx"]), float(a["cy"])) for tag, a in reader.tags if tag == "circle"]


def test_scores_stand_against_size_and_latency():
    reader, text = read(family_page("runs/<all>/", family(), MEMBERS))
    for shown in (
        *("<all> text-classification: 2 models by fisher, 1,234 steps, seed 7", "1.0000 f1 without trimming"),
        *("75%params 0.9000 90.0 % 75.0 % 750,000 15.0 8.0 75-params", "f1 against encoder parameters left, percent"),
        *("f1 against latency of 1 x 128 tokens, ms", 'pipeline("text-classification", "runs/<all>/50-params")'),
    ):
        assert shown in text
    size, time = circles(reader)[:2], circles(reader)[2:]
    assert [x for x, _ in size] == [216.0, 302.0] and size == time  # 50, 75 % of 344, and 10, 15 of 20 ms
    assert size[0][1] > size[1][1]  # the worse score is lower
    squares = [a for tag, a in reader.tags if tag == "rect" and a["width"] == "8"]
    assert [float(a["x"]) + 4 for a in squares] == [388.0, 388.0]


def test_names_do_not_overlap():
    rows = family()["rows"]
    rows[1] |= {"encoder_params_after": 749_000, "metrics": {"f1": 0.9}}
    rows.append(rows[0] | {"budget": "99%params", "encoder_params_after": 990_000})
    reader, _ = read(family_page("all", family(rows=rows, metrics_baseline=None), [{}, {}, {}]))
    names = [a for tag, a in reader.tags if tag == "text" and a.get("text-anchor") == "start"]
    assert len(names) == 3 and float(names[2]["x"]) < 340  # inside the plot
    below = [float(a["y"]) for a in names[:2]]
    assert below[1] - below[0] >= 11 or below[0] - below[1] >= 11


def test_names_of_models_that_are_near_do_not_touch():
    rows = family()["rows"]
    for row, params in zip(rows, (635_000, 452_000), strict=True):  # as far apart as nine letters of 7.2 are wide
        row |= {"encoder_params_after": params, "metrics": {"f1": 0.9}}
    reader, _ = read(family_page("all", family(rows=rows, metrics_baseline=None), [{}, {}]))
    first, second = (float(a["y"]) for tag, a in reader.tags if a.get("text-anchor") == "start")
    assert abs(first - second) >= 11


def test_what_was_not_measured_is_left_out():
    rows = [row | {"metrics": None} for row in family()["rows"]]
    _, text = read(family_page("all", family(rows=rows, metrics_baseline=None), [{}, {}]))
    assert "f1 against" not in text and "latency" not in text and "None" not in text and " MB" not in text
    _, text = read(family_page("all", family(metrics_baseline=None), [MEMBERS[0], {}]))
    assert "f1 against encoder" in text and "latency" not in text and "without trimming" not in text


def test_a_family_that_was_changed_by_hand_is_refused_in_words(tmp_path):
    file = tmp_path / "result.json"
    assert read_family(file) is None
    file.write_text(json.dumps({"method": "fisher", "metrics": {"f1": 0.9}}))
    assert read_family(file) is None  # of a single run
    file.write_text(json.dumps(family()))
    assert read_family(file) == family()
    rows = family()["rows"]
    for changed, message in (
        ({"rows": []}, "has no models"),
        ({"metric": "f2"}, "has no models or no scores"),
        ({"rows": [rows[0] | {"folder": "../other"}]}, r"rows\[0\]: folder is '../other', want a name without a path"),
        ({"rows": [rows[0] | {"budget": 75}]}, r"rows\[0\]: budget is 75, want text"),
        ({"rows": [rows[0] | {"metrics": {}}]}, r"rows\[0\]: metrics has no 'f1'"),
        ({"seconds": {"warm_up_and_analysis": 1.0, "total": 2.0}}, "seconds has no baseline"),
    ):
        file.write_text(json.dumps(family(**changed)))
        with pytest.raises(SensibertError, match=message):
            read_family(file)


def test_the_commands_take_the_folder_of_a_family(tmp_path):
    folder = tmp_path / "all"
    for row, member in zip(family()["rows"], MEMBERS, strict=True):
        (folder / row["folder"]).mkdir(parents=True)
        (folder / row["folder"] / "result.json").write_text(json.dumps(member))
    (folder / "result.json").write_text(json.dumps(family()))
    done = runs.command("inspect", folder, "--json")
    assert done.code == 0 and [row["budget"] for row in done.json["rows"]] == ["75%params", "50%params"]
    assert str(folder / "50-params") in done.out and "of the baseline" in done.out
    done = runs.command("report", folder, "--json")
    assert done.code == 0 and done.json["output"] == str(folder / "report" / "report.html")
    assert "f1 against latency" in (folder / "report" / "report.html").read_text(encoding="utf-8")
    for row in family()["rows"]:  # other commands name the models that the folder holds
        (folder / row["folder"] / "config.json").write_text("{}")
    done = runs.command("eval", folder, "--validation-file", "x.csv")
    assert done.code == 2 and "want the folder of a model; it holds 50-params, 75-params" in done.err
    (folder / "50-params" / "result.json").unlink()
    done = runs.command("report", folder)
    assert done.code == 2 and "result.json: cannot be read" in done.err


def test_the_table_has_the_size_of_every_file():
    known = family()
    assert "MB" not in family_table(known)  # of an earlier version
    for row, megabytes in zip(known["rows"], (8.0, 6.04), strict=True):
        row["mb_after"] = megabytes
    lines = [line.split() for line in family_table(known | {"mb_before": 10.0}).splitlines()]
    assert [line[4] for line in lines if line and line[0] in ("baseline", "75%params", "50%params")] == [
        *("10.0", "8.0", "6.0"),
    ]
