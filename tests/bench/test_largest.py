"""The largest N: both ends were run, a path that changes with N is followed, wrong answers and other failures show."""

import math

import pytest
import torch


def growth(bench, mode, budget, length=None, most=1024):
    return bench.linear_logprob.cases.Growth(16, 300, "bf16", mode, budget, most, length)


def peak(bench, case, entry, n):
    """Measured anew, on N tokens that nothing of the search has made."""
    comparison = bench.logprobs(n, case.h, case.v, torch.bfloat16)
    return bench.measure.timing.peak_mib(lambda: comparison.step(entry, case.mode), "cpu")


@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_n_fits_and_the_next_size_does_not(bench, mode):
    case = growth(bench, mode, 2.0, most=4096)
    entries = bench.measure.entries.make_entries(bench.linear_logprob.peers.FACTORIES, "cpu")
    base, timing = bench.session.comparison_of(case, "cpu", None), bench.measure.timing
    fits, missing = bench.largest.measure_growth(case, base, entries, timing.Timer("cpu"), timing.Budget(None))
    assert missing == []
    assert {fit.entry for fit in fits} == set(entries) >= {"fastdpo", "eager", "trl"}
    for fit in fits:
        assert fit.next_n is not None, fit
        assert 0 < fit.next_n - fit.n <= max(16, fit.n / 16 + 16)
        assert fit.peak_mib <= 2.0 < fit.next_peak_mib
        assert peak(bench, case, entries[fit.entry], fit.n) <= 2.0
        assert peak(bench, case, entries[fit.entry], fit.next_n) > 2.0
        assert set(fit.error) == {"logp", "dh"}
    by_name = {fit.entry: fit.n for fit in fits}
    assert by_name["fastdpo"] > by_name["eager"] > by_name["trl"]


def test_a_size_that_was_never_exceeded_is_a_lower_limit_and_one_that_never_fits_is_none(bench, tmp_path, capsys):
    status, record = bench.measured(tmp_path, "--entries", "fastdpo,eager", "--memory_budget", "400")
    assert status == 0
    assert {(fit["n"], fit["next_n"]) for fit in record["largest"]} == {(1024, None)}
    assert ">= 1024" in capsys.readouterr().out
    status, record = bench.measured(tmp_path, "--entries", "fastdpo,eager", "--memory_budget", "0.001")
    assert status == 0
    for fit in record["largest"]:
        assert (fit["n"], fit["peak_mib"], fit["error"]) == (0, None, {})
        assert fit["next_n"] == 16
        assert fit["next_peak_mib"] > 0.001
    assert "none" in capsys.readouterr().out
    table = bench.show.readme.table(next(iter(tmp_path.glob("*.json"))))
    assert "| 16 x 300, bf16 frozen | none fits | none fits |" in table


def test_of_pairs_n_is_their_scored_tokens(bench, tmp_path):
    status, record = bench.measured(tmp_path, "--memory_budget", "0.5", "--entries", "fastdpo,eager", case="dpo_loss")
    assert status == 0
    fits = {(fit["entry"], fit["mode"]): fit for fit in record["largest"]}
    assert set(fits) == {(entry, mode) for entry in ("fastdpo", "eager") for mode in ("frozen", "trained")}
    fit = fits["eager", "frozen"]
    assert fit["length"] == 16
    pairs, count = bench.dpo_loss.cases, bench.dpo_loss.step.GROWN_FROM
    base = pairs.PairInputs.of(pairs.PairCase(count, 16, 16, 300, "bf16", "frozen"), "cpu")
    tokens = {}
    for size in range(1, 64):
        grown = base.take([i % count for i in range(size)])
        tokens[size] = len(grown.targets)
        assert tokens[size] == int(grown.offsets[-1])
    assert fit["n"] in tokens.values()
    assert fit["next_n"] in tokens.values()
    assert fits["fastdpo", "frozen"]["n"] > fit["n"]
    assert set(fit["error"]) == {"rewards", "dh"}


def test_the_search_passes_a_bump_and_halves_above_the_last_that_fits(bench):
    tried = []

    def peak_of(size):
        tried.append(size)
        # a path that keeps something up to size 20 and then does not
        return float(size if size > 20 else 3 * size)

    peaks = bench.largest.search(peak_of, 40.0, 1024, 320.0)
    assert tried[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    low, high = bench.largest.around(peaks, 40.0)
    assert (low, high) == (40, 42)
    assert peaks[low] <= 40 < peaks[high]
    # where memory ends, too
    peaks = bench.largest.search(lambda size: size if size <= 33 else math.inf, 100.0, 1024, 800.0)
    assert bench.largest.around(peaks, 100.0) == (32, 34)


def test_an_answer_that_is_wrong_at_that_size_is_no_fit(bench, tmp_path, capsys):
    def wrong_when_long(hidden, weight, labels, softcap):
        out = bench.linear_logprob.peers.eager(hidden, weight, labels)
        return out if len(labels) <= 64 else out * 1.2

    bench.with_entry("fastdpo", wrong_when_long)
    status, record = bench.measured(tmp_path, "--memory_budget", "0.5")
    assert status == 1
    assert [fit["entry"] for fit in record["largest"]] == ["eager", "eager"]
    reasons = [m["reason"] for m in record["missing"] if m["entry"] == "fastdpo"]
    assert len(reasons) == 2
    assert all("failed the oracle" in reason and reason.startswith("N = ") for reason in reasons)


def test_out_of_memory_does_not_fit_and_other_failures_are_named(bench, tmp_path, capsys):
    def small(hidden, weight, labels, softcap):
        if len(labels) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return bench.linear_logprob.peers.eager(hidden, weight, labels)

    bench.with_entry("peer", small)
    _, record = bench.measured(tmp_path, "--memory_budget", "50")
    (fit,) = (fit for fit in record["largest"] if (fit["entry"], fit["mode"]) == ("peer", "frozen"))
    assert (fit["n"], fit["next_n"], fit["next_peak_mib"]) == (96, 112, None)
    assert "OOM" in capsys.readouterr().out

    def broken(hidden, weight, labels, softcap):
        if len(labels) > 100:
            raise RuntimeError("an odd number of tokens")
        return bench.linear_logprob.peers.eager(hidden, weight, labels)

    bench.with_entry("peer", broken)
    _, record = bench.measured(tmp_path, "--memory_budget", "50")
    assert {m["reason"] for m in record["missing"]} == {"RuntimeError: an odd number of tokens"}


def test_a_search_ends_with_its_time(bench):
    case = growth(bench, "frozen", 1.0)
    base = bench.session.comparison_of(case, "cpu", None)
    entries = {"eager": bench.linear_logprob.peers.EAGER}
    timer = bench.measure.timing.Timer("cpu")
    fits, missing = bench.largest.measure_growth(case, base, entries, timer, bench.measure.timing.Budget(0))
    assert fits == []
    assert [str(m) for m in missing] == [f"{case.name}: eager: no time left"]


def test_a_budget_that_would_fill_the_machine_is_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.benchmark, "free_mib", lambda: 4000.0)
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--memory_budget", "600"]) == 2
    assert "--memory_budget 600: at most an eighth of this machine's free memory, 500 MiB" in capsys.readouterr().err
    monkeypatch.setattr(bench.largest, "free_mib", lambda: 4000.0)
    assert bench.largest._stop(400.0, "cpu") == 1000.0
    assert bench.largest._stop(50.0, "cpu") == 200.0
    assert bench.largest._stop(4000.0, "cuda") == 16000.0
