"""A whole run: every row with its conditions, what is refused, and what a stopped run leaves."""

import json
import re
import subprocess

import pytest
import torch


def test_run_writes_every_condition(bench, tmp_path, monkeypatch, capsys):
    status, record = bench.measured(tmp_path, "--rounds", "2")
    assert status == 0
    assert {"device", "threads", "torch", "versions", "commit", "command", "date", "load_average_at_start"} <= set(
        record["environment"]
    )
    assert record["complete"]
    assert record["missing"] == record["refused"] == []
    entries = bench.measure.entries.make_entries(bench.linear_logprob.peers.FACTORIES, "cpu")
    assert {row["entry"] for row in record["rows"]} == set(entries) >= {"fastdpo", "eager", "trl"}
    assert len(record["rows"]) == 6 * len(entries)
    for row in record["rows"]:
        assert row["best_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["rounds"] == 2
        assert row["peak_mib"] > 0
        assert (row["n"], row["h"], row["v"]) == (40, 16, 700)
        assert row["copy_gbs"] > 0
        assert row["flop"] == row["tflop"] * 1e12 >= 2 * 40 * 16 * 700
        if row["entry"] == "fastdpo":
            assert row["peak_mib"] <= row["predicted_peak_mib"], row["case"]
            assert row["path"].startswith({"forward": "stats", "frozen": "one_pass"}.get(row["mode"], row["path"]))
        assert row["gemm_share"] == pytest.approx(row["flop"] / row["median_ms"] / 1e9 / row["gemm_tflops"])
        assert row["copy_share"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6 / row["copy_gbs"])
        # a tile is written and read, by whatever path; no bound is made of bytes that may stay in a CPU's cache
        assert row["bytes"] > 8 * 40 * 700
        assert row["bound_ms"] is None
        if row["mode"] != "forward":
            assert 0 <= row["row_errors"]["share_within"] <= 1
    printed = capsys.readouterr().out
    assert re.search(r"40x16x700 bf16 frozen; GEMM .*\n.*of GEMM.*of copy.*vs, on a CPU\n +fastdpo +[\d.]+", printed)
    assert "these ratios are CPU ratios" in printed
    assert re.search(r"40x16x700 bf16 frozen +[\d.]+ ms, 0 MiB +[\d.]+ x, 0 MiB", printed)  # the summary
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_dpo_loss_is_measured_from_ours_to_eager(bench, tmp_path):
    status, record = bench.measured(tmp_path, case="dpo_loss")
    assert status == 0
    assert record["complete"]
    entries = {row["entry"] for row in record["rows"]}
    assert {"fastdpo", "fastdpo rows", "eager"} <= entries
    assert len(record["rows"]) == 2 * len(entries)
    flop = {row["entry"]: row["flop"] for row in record["rows"] if row["mode"] == "frozen"}
    cases = bench.dpo_loss.cases
    pairs = cases.PairInputs.of(cases.pair_cases("cpu", quick=False)[0], "cpu")
    assert flop["fastdpo rows"] == 6 * len(pairs.targets) * 16 * 700  # 4 for the policy, 2 for the reference
    assert flop["eager"] == 6 * pairs.labels.numel() * 16 * 700
    for row in record["rows"]:
        assert set(row["error"]) == {"rewards", "dh"} | ({"dw"} if row["mode"] == "trained" else set())
        assert row["pairs"] == 2


def test_a_wrong_entry_is_refused_and_only_ours_fails_the_run(bench, tmp_path, monkeypatch, capsys):
    def wrong(hidden, weight, labels, softcap):
        return bench.linear_logprob.peers.eager(hidden, weight, labels) + 0.5

    bench.with_entry("peer", wrong)
    status, record = bench.measured(tmp_path, "--quick")
    assert status == 0
    assert {row["entry"] for row in record["rows"]} == {"fastdpo", "eager"}
    assert len(record["refused"]) == 6
    assert "peer: (version 1) failed the oracle, not timed: {'logp': 0.5" in capsys.readouterr().out

    bench.with_entry("fastdpo", wrong)
    status, record = bench.measured(tmp_path, "--quick")
    assert status == 1


def test_an_entry_that_runs_out_of_memory_is_reported(bench, tmp_path, monkeypatch, capsys):
    def large(hidden, weight, labels, softcap):
        if hidden.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return bench.linear_logprob.peers.eager(hidden, weight, labels)

    bench.with_entry("large", large)
    status, record = bench.measured(tmp_path)
    assert status == 0
    assert [row["mode"] for row in record["rows"] if row["entry"] == "large"] == ["forward", "forward"]
    assert [m["reason"] for m in record["missing"]] == ["out of memory"] * 4
    assert "  large: out of memory\n" in capsys.readouterr().out


def test_cases_that_do_not_fit_the_budget_are_listed(bench, tmp_path, monkeypatch, capsys):
    status, record = bench.measured(tmp_path, "--minutes", "0")
    assert status == 0
    assert record["rows"] == []
    assert [m["reason"] for m in record["missing"]] == ["no time left"] * 6
    assert "not measured:\n  40x16x700 fp32 forward: no time left" in capsys.readouterr().out


def test_an_interrupted_run_leaves_what_it_has(bench, tmp_path, monkeypatch):
    def interrupted(hidden, weight, labels, softcap):
        if weight.requires_grad:
            raise KeyboardInterrupt
        return bench.linear_logprob.peers.eager(hidden, weight, labels)

    bench.with_entry("peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.measured(tmp_path)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert {row["mode"] for row in record["rows"]} == {"forward", "frozen"}
    assert len(record["rows"]) == 6
    assert [(m["entry"], m["reason"]) for m in record["missing"]] == [("", "not reached")] * 4
    assert record["missing"][0]["case"] == "40x16x700 fp32 trained"


def test_a_run_that_is_stopped_in_its_first_case_leaves_an_older_file_alone(bench, tmp_path, monkeypatch):
    bench.measured(tmp_path, "--entries", "eager")
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()

    def interrupted(hidden, weight, labels, softcap):
        raise KeyboardInterrupt

    bench.with_entry("peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.measured(tmp_path)
    assert path.read_text() == before


def test_a_quick_run_leaves_a_full_ones_file_alone(bench, tmp_path):
    bench.measured(tmp_path, "--entries", "eager", "--rounds", "1", case="dpo_loss")
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()
    arguments = ["--quick", "--no_plot", "--memory_budget", "0", "--entries", "eager", "--out", str(tmp_path)]
    assert bench.run.main(["dpo_loss", "--device", "cpu", *arguments]) == 0
    assert path.read_text() == before
    (quick,) = set(tmp_path.glob("*.json")) - {path}
    assert quick.name.startswith("dpo_loss_cpu_quick_")
    assert {row["rounds"] for row in json.loads(quick.read_text())["rows"]} == {3}


def test_new_files_of_ours_make_a_checkout_dirty_and_results_do_not(bench, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "run.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(bench.measure.conditions, "ROOT", tmp_path)
    (tmp_path / "bench" / "results" / "r.json").write_text("{}")
    (tmp_path / "notes").write_text("")
    assert re.fullmatch(r"[0-9a-f]{12}", bench.measure.conditions._commit())
    (tmp_path / "bench" / "new.py").write_text("")
    assert bench.measure.conditions._commit().endswith("+dirty")


def test_nothing_runs_on_a_device_that_is_lost(bench, tmp_path, monkeypatch, capsys):
    def broken(hidden, weight, labels, softcap):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.with_entry("peer", broken)
    monkeypatch.setattr(bench.session, "device_lost", lambda device: "an illegal memory access")
    status, record = bench.measured(tmp_path)
    assert status == 1
    assert not record["complete"]
    assert [m["reason"] for m in record["missing"]][1:] == ["not reached"] * 5
    assert "the device is lost" in capsys.readouterr().out


def test_a_forced_form_that_takes_the_defaults_path_is_not_timed_twice(bench, tmp_path):
    _, record = bench.measured(tmp_path, "--entries", "fastdpo,fastdpo cublas,eager", "--quick")
    assert {row["entry"] for row in record["rows"]} == {"fastdpo", "eager"}
    reasons = {(m["entry"], m["reason"]) for m in record["missing"]}
    assert reasons == {("fastdpo cublas", "same path as fastdpo; not timed twice")}


def test_real_activations_are_stored_and_measured(bench, tmp_path, monkeypatch, capsys):
    from fastdpo.demo import demo_paths

    demo, path = demo_paths(), tmp_path / "activations.safetensors"
    pairs = tmp_path / "few.jsonl"
    pairs.write_text("\n".join(demo.train.read_text().splitlines()[:8]) + "\n")
    real = bench.linear_logprob.real
    assert real.main([str(demo.model), "--pairs", str(pairs), "--tokens", "48", "--out", str(path)]) == 0
    n, h, v = real.shape(path)
    assert n == 48
    hidden, weight, labels = real.load(path, 20, "cpu")
    assert (hidden.shape, weight.shape, labels.shape) == ((20, h), (v, h), (20,))
    # a model that was trained on such answers finds them likely
    logp = bench.linear_logprob.peers.eager(hidden, weight, labels)
    assert float(logp.mean()) > -3
    status, record = bench.measured(tmp_path, "--quick", "--entries", "fastdpo,eager", "--real", str(path))
    assert status == 0
    assert [row["case"] for row in record["rows"]][-1] == f"48x{h}x{v} bf16 trained real"
    path.write_bytes(b"no tensors")
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--real", str(path)]) == 2
    assert "holds no activations" in capsys.readouterr().err


def test_cuda_without_a_device_is_refused_with_words(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert bench.run.main(["linear_logprob", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_an_installed_package_names_no_commit_of_the_repository_around_it(bench, tmp_path, monkeypatch):
    conditions = bench.measure.conditions
    monkeypatch.setattr(conditions, "ROOT", conditions.ROOT / "bench")  # below a checkout, and none itself
    assert conditions._commit() == ""
    environment = conditions.environment("cpu", "command")
    assert "; no checkout; " in bench.show.sentences.conditions(environment)
    assert conditions.environment("cpu", "command", "abc")["commit"] == "abc"
