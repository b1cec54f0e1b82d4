"""--baseline: ratios to an earlier result, what fails the run, what is named, what is refused."""

import json
from copy import deepcopy

import pytest


@pytest.fixture
def record() -> dict:
    """A result of two cases with ours and a peer, and a search of the largest N."""
    rows = [
        {"case": case, "entry": entry, "best_ms": ms, "median_ms": 2 * ms, "peak_mib": peak}
        for case, ms, peak in (("40x16x700 fp32 forward", 10.0, 100.0), ("40x16x700 fp32 frozen", 20.0, 50.0))
        for entry in ("fastdpo", "eager")
    ]
    environment = {"device": "CPU X, 2 cores", "threads": 2, "commit": "abc", "torch": "2.13", "date": "D"}
    largest = [{"case": "largest", "entry": entry, "n": 320} for entry in ("fastdpo", "eager")]
    head = {"case": "linear_logprob", "clock": "best_ms", "complete": True, "missing": [], "largest": largest}
    return {**head, "environment": environment, "rows": rows}


def row_of(record: dict, case: str, entry: str) -> dict:
    return next(row for row in record["rows"] if row["case"].endswith(case) and row["entry"] == entry)


def test_ratios_are_of_now_to_before_and_only_ours_count(bench, record):
    now = deepcopy(record)
    row_of(now, "forward", "fastdpo")["best_ms"] = 11.0
    row_of(now, "frozen", "eager")["best_ms"] = 60.0
    row_of(now, "frozen", "eager")["median_ms"] = 1e9  # the clock is the device's
    verdict = bench.baseline.compare(record, now, "before.json", 1.15)
    assert verdict.behind == []
    lines = [line.split() for line in verdict.text.splitlines()]
    for expected in (
        "40x16x700 fp32 forward fastdpo 10 11 1.10 x 100.0 100.0 1.00 x",
        "40x16x700 fp32 frozen eager 20 60 3.00 x 50.0 50.0 1.00 x slower",
    ):
        assert expected.split() in lines
    assert "none of ours is past 1.15 x" in verdict.text
    assert "before.json (commit abc, torch 2.13, D)" in verdict.text

    verdict = bench.baseline.compare(record, now, "before.json", 1.05)
    assert verdict.behind == ["40x16x700 fp32 forward: fastdpo: slower"]


def test_memory_and_the_largest_n_count_too(bench, record):
    now = deepcopy(record)
    row_of(now, "forward", "fastdpo")["peak_mib"] = 130.0
    now["largest"][0]["n"], now["largest"][1]["n"] = 256, 16
    verdict = bench.baseline.compare(record, now, "b", 1.15)
    assert verdict.behind == ["40x16x700 fp32 forward: fastdpo: more memory", "largest: fastdpo: fewer"]
    assert "largest  fastdpo: N 320 -> 256  fewer" in verdict.text
    now["largest"][0]["n"] = 300  # within the threshold, as the search's own steps are
    row_of(record, "forward", "fastdpo")["peak_mib"] = 0.5
    row_of(now, "forward", "fastdpo")["peak_mib"] = 1.2  # an allocator's rounding
    assert bench.baseline.compare(record, now, "b", 1.15).behind == []


def test_what_stands_on_one_side_is_named(bench, record):
    now = deepcopy(record)
    now["rows"] = [row for row in now["rows"] if not row["case"].endswith("forward")]
    now["rows"].append({**row_of(now, "frozen", "eager"), "entry": "trl"})
    now["rows"].remove(row_of(now, "frozen", "fastdpo"))
    now["missing"] = [{"case": "40x16x700 fp32 frozen", "entry": "fastdpo", "reason": "out of memory"}]
    verdict = bench.baseline.compare(record, now, "b", 1.15)
    assert "only in the baseline: 40x16x700 fp32 forward\n" in verdict.text
    assert "only in the baseline: 40x16x700 fp32 frozen: fastdpo (here: out of memory)\n" in verdict.text
    assert "only here: 40x16x700 fp32 frozen: trl\n" in verdict.text
    # it fitted before
    assert verdict.behind == ["40x16x700 fp32 frozen: fastdpo: out of memory"]
    now["missing"][0]["reason"] = "no time left"
    assert bench.baseline.compare(record, now, "b", 1.15).behind == []


def test_another_device_or_shape_is_refused_in_one_sentence(bench, record, tmp_path):
    path = tmp_path / "b.json"
    names = [row["case"] for row in record["rows"]]
    here = record["environment"]
    bench.baseline.check(record, path, "linear_logprob", here, names)
    for change, said in (
        ({"device": "CPU Y, 8 cores"}, "was measured on CPU X, 2 cores with 2 threads, this is CPU Y, 8 cores with 2"),
        ({"threads": 1}, "with 2 threads, this is CPU X, 2 cores with 1 threads: give one of the same device"),
    ):
        with pytest.raises(bench.arguments.UsageError, match=said):
            bench.baseline.check(record, path, "linear_logprob", {**here, **change}, names)
    with pytest.raises(bench.arguments.UsageError, match="no shape in common with this run: it holds '40x16x700 fp32"):
        bench.baseline.check(record, path, "linear_logprob", here, ["512x512x32000 fp32 forward"])
    with pytest.raises(bench.arguments.UsageError, match="holds linear_logprob, and dpo_loss is measured"):
        bench.baseline.check(record, path, "dpo_loss", here, names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON: "),
        ("[1]", "is no result of this command"),
        ('{"case": "x", "environment": {}, "rows": []}', "is no result of this command"),
    ],
)
def test_a_file_that_is_no_result_is_refused(bench, tmp_path, capsys, text, said):
    path = tmp_path / "b.json"
    if text is not None:
        path.write_text(text)
    assert bench.run.main(["--baseline", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench.run: error: --baseline {path} ")
    assert said in error
    assert error.count("\n") == 1


def test_a_run_is_compared_with_an_earlier_one(bench, tmp_path, capsys):
    before, now = tmp_path / "before", tmp_path / "now"
    entries = ("--entries", "fastdpo,eager", "--memory_budget", "1")
    _, record = bench.measured(before, *entries)
    (path,) = before.glob("*.json")
    # no peak changes from run to run, and no time becomes a million times what it was
    status, _ = bench.measured(now, *entries, "--baseline", str(path), "--threshold", "1e6")
    printed = capsys.readouterr().out
    assert status == 0
    assert "none of ours is past 1e+06 x" in printed
    assert "only " not in printed.partition("against ")[2]
    for row in record["rows"]:
        if row["entry"] == "fastdpo":
            row["best_ms"] /= 1e7
    path.write_text(json.dumps(record))
    status, _ = bench.measured(now, *entries, "--baseline", str(path), "--threshold", "1e6")
    printed = capsys.readouterr().out
    assert status == 1
    assert printed.count(": fastdpo: slower") == 6
    assert bench.run.main(["--baseline", str(path), "--device", "cpu", "--out", str(before)]) == 2
    assert "is the file that this run writes: give another --out" in capsys.readouterr().err
    assert bench.run.main(["dpo_loss", "--baseline", str(path)]) == 2
    assert "holds linear_logprob: measure that case alone with it" in capsys.readouterr().err
