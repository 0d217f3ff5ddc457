"""Rows of the benches: a ratio above 1 means better, tables, rows that another machine measured."""

import _harness
import pytest
from _rows import add, main, read, table


@pytest.mark.parametrize("unit, ratio", [("us", 2.0), ("ms", 2.0), ("s", 2.0), ("1/s", 0.5)])
def test_less_time_is_better_and_so_is_a_higher_rate(tmp_path, monkeypatch, unit, ratio):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    assert _harness.record("bench_any", "case", "metric", 1.0, unit, "rival", 2.0)["ratio"] == ratio


def test_rows_are_shown_in_columns_and_added_to_the_file_of_their_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    rows = [
        _harness.record("bench_a", "dense", "ms", 2.0, "ms"),
        _harness.record("bench_b", "x", "ms", 1, "ms", "y", 3),
    ]
    assert [line.split() for line in table(rows).splitlines()[1:]] == [
        ["bench_a", "dense", "ms", "2.0", "ms"],
        ["bench_b", "x", "ms", "1", "ms", "y", "3", "3.0"],
    ]
    add(rows, tmp_path)
    assert [len(read(tmp_path / f"{name}.jsonl")) for name in ("bench_a", "bench_b")] == [2, 2]
    capsys.readouterr()
    main(["show", str(tmp_path / "bench_b.jsonl")])
    assert capsys.readouterr().out.count("bench_b") == 2


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit, match="show FILE"):
        main(["shwo", "file"])
