"""The benchmark suite: its oracle refuses a wrong entry, its rounds interleave, its report holds every condition."""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODULES = [path.stem for path in (ROOT / "bench").glob("*.py")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The suite's modules, with toy shapes, and rates and bounds as on a GPU."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = SimpleNamespace(**{name: import_module(f"bench.{name}") for name in MODULES})
    monkeypatch.setattr(found.cases, "CPU_SHAPES", [(40, 16, 700)])
    monkeypatch.setattr(found.pairs, "CPU_SHAPES", [(2, 24, 16, 700)])
    rounds = found.timing.Rounds(2, least=1, slice_ms=400)
    settings = replace(found.session.SETTINGS["cpu"], rounds=rounds, ceilings=True)
    monkeypatch.setitem(found.session.SETTINGS, "cpu", settings)
    return found


def run(bench: SimpleNamespace, out: Path, *arguments: str, case: str = "linear_logprob") -> tuple[int, dict]:
    status = bench.run.main([case, "--device", "cpu", "--out", str(out), *arguments])
    (path,) = out.glob(f"{case}_cpu_*.json")
    return status, json.loads(path.read_text())


def with_entry(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, function) -> None:
    """One more entry in linear_logprob, beside ours and eager."""
    factory = bench.entries.Factory(name, lambda name: bench.entries.Entry(name, "version 1", function))
    kept = [f for f in bench.peers.FACTORIES if f.name in ("fastdpo", "eager") and f.name != name]
    monkeypatch.setattr(bench.peers, "FACTORIES", (*kept, factory))


def logprobs(bench: SimpleNamespace, n: int, h: int, v: int, dtype: torch.dtype, softcap: float | None = None):
    return bench.linear_logprob.Logprobs(*bench.cases.peaked_inputs(n, h, v, dtype, "cpu"), softcap)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_truth_is_autograds_in_fp64(bench, softcap):
    comparison = logprobs(bench, 300, 8, 5000, torch.float64, softcap)

    def exact(hidden, weight, labels, softcap):
        z = hidden @ weight.t()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z, -1).gather(1, labels[:, None])[:, 0]

    outputs = comparison.step(replace(bench.peers.EAGER, run=exact), "trained")
    assert len(outputs) == 3
    assert all(error < 1e-12 for error in comparison.truth.errors(outputs).values())
    assert comparison.truth.row_errors(outputs)["max"] < 1e-12


def test_the_truth_of_pairs_is_autograds_in_fp64(bench):
    pairs = bench.pairs.Pairs.of(bench.pairs.PairCase(3, 20, 8, 900, "fp32", "trained"), "cpu")
    wide = bench.pairs.Pairs(pairs.hidden.double(), pairs.ref_hidden.double(), pairs.weight.double(), pairs.labels)
    comparison = bench.dpo_loss.DPOLosses(wide)

    def exact(pairs, hidden, weight):
        scored = pairs.labels != bench.pairs.IGNORE

        def sums(states, head):
            logp = torch.log_softmax(states @ head.t(), -1)
            return (logp.gather(-1, pairs.labels.clamp(min=0)[..., None])[..., 0] * scored).sum(1)

        rewards = bench.pairs.BETA * (sums(hidden, weight) - sums(pairs.ref_hidden, pairs.weight).detach())
        chosen, rejected = rewards.chunk(2)
        return torch.log1p(torch.exp(rejected - chosen)).mean(), rewards

    outputs = comparison.step(replace(bench.dpo_peers.EAGER, run=exact), "trained")
    error = comparison.truth.errors(outputs)
    assert error.pop("rewards") < 1e-6  # carried in fp32
    assert set(error) == {"dh", "dw"}
    assert all(e < 1e-12 for e in error.values())


@pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
def test_every_entry_passes_the_oracle_and_a_wrong_one_does_not(bench, mode):
    comparison = logprobs(bench, 64, 32, 900, torch.bfloat16)
    entries = bench.entries.found(bench.peers.FACTORIES, "cpu")
    assert list(entries) == ["fastdpo", "eager", "trl"]
    by_eager = comparison.eager_errors
    for name, entry in entries.items():
        error = comparison.truth.errors(comparison.step(entry, mode))
        assert len(error) == {"forward": 1, "frozen": 2, "trained": 3}[mode]
        assert bench.truth.passes(error, by_eager), name

    def wrong(hidden, weight, labels, softcap):
        return bench.peers.eager(hidden, weight, labels) * 1.05

    error = comparison.truth.errors(comparison.step(replace(entries["eager"], run=wrong), mode))
    assert not bench.truth.passes(error, by_eager)


def test_what_is_not_sampled_must_be_finite_all_the_same(bench):
    comparison = logprobs(bench, 300, 8, 500, torch.float32)
    outputs = comparison.step(bench.peers.EAGER, "frozen")
    sampled = comparison.truth.rows["dh"].tolist()
    hole = next(i for i in range(300) if i not in sampled)
    outputs["dh"][hole, 3] = float("nan")
    assert comparison.truth.errors(outputs)["dh"] == float("inf")


def test_eager_in_blocks_errs_as_eager_at_once(bench, monkeypatch):
    at_once = logprobs(bench, 300, 16, 900, torch.bfloat16).eager_errors
    monkeypatch.setattr(bench.linear_logprob, "BLOCK", 128)
    in_blocks = logprobs(bench, 300, 16, 900, torch.bfloat16).eager_errors
    assert in_blocks["logp"] == at_once["logp"]
    assert all(0.5 < in_blocks[name] / at_once[name] < 2 for name in at_once)


def test_rounds_are_interleaved_and_the_first_is_a_warm_up(bench):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times, failed = bench.timing.interleaved(runs, bench.timing.Rounds(2), bench.timing.Timer("cpu"))
    assert order == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}
    assert not failed


def test_a_slow_run_gets_fewer_rounds_spread_over_all(bench, monkeypatch):
    order, timer = [], bench.timing.Timer("cpu")
    monkeypatch.setattr(timer, "once", lambda run: run())

    def timed(name, ms):
        return lambda: order.append(name) or ms

    runs = {"slow": timed("s", 50.0), "fast": timed("f", 1.0)}
    times, _ = bench.timing.interleaved(runs, bench.timing.Rounds(9, least=3, slice_ms=20.0), timer)
    assert "".join(order) == "sf" + "ffsf" * 3
    assert len(times["slow"]) == 3


def test_a_run_that_fails_in_a_round_is_dropped_and_named(bench):
    left = [1, 1]

    def fails_later():
        left.pop()

    runs = {"good": lambda: None, "bad": fails_later}
    times, failed = bench.timing.interleaved(runs, bench.timing.Rounds(4), bench.timing.Timer("cpu"))
    assert len(times["good"]) == 4
    assert set(times) == {"good"}
    assert failed["bad"].startswith("IndexError")


def test_inputs_are_peaked(bench):
    hidden, weight, labels = bench.cases.peaked_inputs(200, 64, 4000, torch.float32, "cpu")
    p = torch.softmax(hidden @ weight.t(), -1).gather(1, labels[:, None])
    assert float((p > 0.9).float().mean()) > 0.3
    assert float((p < 0.1).float().mean()) > 0.1


def test_masks_are_prompt_shaped(bench):
    pairs = bench.pairs.Pairs.of(bench.pairs.PairCase(3, 64, 8, 90, "bf16", "frozen"), "cpu")
    scored = pairs.labels != bench.pairs.IGNORE
    first = scored.int().argmax(1)
    assert torch.equal(first[:3], first[3:])  # a pair shares its prompt
    assert int(first.min()) >= 16
    assert torch.equal(scored.sum(1), pairs.offsets.diff())
    assert bool((scored.int().diff(dim=1).abs().sum(1) <= 2).all())  # one stretch in each row
    assert torch.equal(pairs.labels[scored], pairs.targets)
    assert not bool(scored[:, -1].all())  # padding


def test_the_cases_of_a_gpu_come_in_order_of_importance(bench):
    cases = bench.cases.cases("cuda", quick=False, real=(4096, 576, 49152))
    assert {c.head for c in cases[:18]} == {head.model for head in bench.cases.HEADS}
    assert {(c.n, c.dtype) for c in cases[:18]} == {(4096, "bf16")}
    assert [c.inputs for c in cases[18:21]] == ["real"] * 3
    assert [c.n for c in cases[21:57]] == [1024] * 18 + [16384] * 18
    assert [c.dtype for c in cases[57:]] == ["fp16"] * 3 + ["fp32"] * 3
    assert len({c.name for c in cases}) == len(cases)
    assert next(c for c in cases if c.head == "Gemma-2-2B").softcap == 30.0


def test_run_writes_every_condition(bench, tmp_path, monkeypatch, capsys):
    status, record = run(bench, tmp_path, "--rounds", "2")
    assert status == 0
    assert {"device", "threads", "torch", "versions", "commit", "command", "date", "load_average_at_start"} <= set(
        record["environment"]
    )
    assert record["complete"]
    assert record["missing"] == record["refused"] == []
    assert len(record["rows"]) == 18
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
        if row["entry"] != "eager":
            assert row["bound_ms"] == pytest.approx(
                row["flop"] / row["gemm_tflops"] / 1e9 + row["tile_bytes"] / row["copy_gbs"] / 1e6
            )
        if row["mode"] != "forward":
            assert 0 <= row["row_errors"]["share_within"] <= 1
    printed = capsys.readouterr().out
    assert re.search(r"40x16x700 bf16 frozen; GEMM .*\n.*bound ms.*\n +fastdpo +[\d.]+", printed)
    assert "no ratio here speaks of one" in printed
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_dpo_loss_is_measured_from_ours_to_eager(bench, tmp_path):
    status, record = run(bench, tmp_path, case="dpo_loss")
    assert status == 0
    assert record["complete"]
    entries = {row["entry"] for row in record["rows"]}
    assert {"fastdpo", "fastdpo rows", "eager"} <= entries
    assert len(record["rows"]) == 2 * len(entries)
    flop = {row["entry"]: row["flop"] for row in record["rows"] if row["mode"] == "frozen"}
    pairs = bench.pairs.Pairs.of(bench.pairs.pair_cases("cpu", quick=False)[0], "cpu")
    assert flop["fastdpo rows"] == 6 * len(pairs.targets) * 16 * 700  # 4 for the policy, 2 for the reference
    assert flop["eager"] == 6 * pairs.labels.numel() * 16 * 700
    for row in record["rows"]:
        assert set(row["error"]) == {"rewards", "dh"} | ({"dw"} if row["mode"] == "trained" else set())
        assert row["pairs"] == 2


def test_a_wrong_entry_is_refused_and_only_ours_fails_the_run(bench, tmp_path, monkeypatch, capsys):
    def wrong(hidden, weight, labels, softcap):
        return bench.peers.eager(hidden, weight, labels) + 0.5

    with_entry(bench, monkeypatch, "peer", wrong)
    status, record = run(bench, tmp_path, "--quick")
    assert status == 0
    assert {row["entry"] for row in record["rows"]} == {"fastdpo", "eager"}
    assert len(record["refused"]) == 6
    assert "peer: (version 1) failed the oracle, not timed: {'logp': 0.5" in capsys.readouterr().out

    with_entry(bench, monkeypatch, "fastdpo", wrong)
    status, record = run(bench, tmp_path, "--quick")
    assert status == 1


def test_an_entry_that_runs_out_of_memory_is_reported(bench, tmp_path, monkeypatch, capsys):
    def large(hidden, weight, labels, softcap):
        if hidden.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return bench.peers.eager(hidden, weight, labels)

    with_entry(bench, monkeypatch, "large", large)
    status, record = run(bench, tmp_path)
    assert status == 0
    assert [row["mode"] for row in record["rows"] if row["entry"] == "large"] == ["forward", "forward"]
    assert [m["reason"] for m in record["missing"]] == ["out of memory"] * 4
    assert "  large: out of memory\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reason",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_other_words_for_out_of_memory(bench, reason):
    assert bench.faults.out_of_memory(reason) == "out of memory"
    assert bench.faults.out_of_memory(RuntimeError("out of range")) is None


def test_cases_that_do_not_fit_the_budget_are_listed(bench, tmp_path, monkeypatch, capsys):
    status, record = run(bench, tmp_path, "--minutes", "0")
    assert status == 0
    assert record["rows"] == []
    assert [m["reason"] for m in record["missing"]] == ["no time left"] * 6
    assert "not measured:\n  40x16x700 fp32 forward: no time left" in capsys.readouterr().out


def test_a_budget_that_ends_within_a_case_keeps_what_it_has(bench, monkeypatch):
    now = [0.0]
    budget = bench.timing.Budget(1.0, clock=lambda: now[0])

    def slow(hidden, weight, labels, softcap):
        now[0] += 20.0
        return bench.peers.eager(hidden, weight, labels)

    case = bench.cases.Case(40, 16, 700, "fp32", "forward")
    eager = bench.peers.EAGER
    entries = {name: replace(eager, name=name, run=slow) for name in ("a", "b", "c")}
    comparison = logprobs(bench, 40, 16, 700, torch.float32)
    rounds, timer = bench.timing.Rounds(5), bench.timing.Timer("cpu")
    # an entry runs twice before the rounds: checked, and its peak taken
    rows, missing = bench.measure.measure_case(case, comparison, entries, rounds, timer, budget, {})
    assert rows == []
    assert [str(m) for m in missing] == [f"{case.name}: {name}: no time left" for name in "abc"]
    now[0] = -160.0
    rows, missing = bench.measure.measure_case(case, comparison, entries, rounds, timer, budget, {})
    assert {row.entry: len(row.times) for row in rows} == {"a": 1, "b": 1, "c": 1}
    assert missing == []


def test_an_interrupted_run_leaves_what_it_has(bench, tmp_path, monkeypatch):
    def interrupted(hidden, weight, labels, softcap):
        if weight.requires_grad:
            raise KeyboardInterrupt
        return bench.peers.eager(hidden, weight, labels)

    with_entry(bench, monkeypatch, "peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert {row["mode"] for row in record["rows"]} == {"forward", "frozen"}
    assert len(record["rows"]) == 6
    assert [(m["entry"], m["reason"]) for m in record["missing"]] == [("", "not reached")] * 4
    assert record["missing"][0]["case"] == "40x16x700 fp32 trained"


def test_a_run_that_is_stopped_in_its_first_case_leaves_an_older_file_alone(bench, tmp_path, monkeypatch):
    run(bench, tmp_path, "--entries", "eager", "--quick")
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()

    def interrupted(hidden, weight, labels, softcap):
        raise KeyboardInterrupt

    with_entry(bench, monkeypatch, "peer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path)
    assert path.read_text() == before


def test_nothing_runs_on_a_device_that_is_lost(bench, tmp_path, monkeypatch, capsys):
    def broken(hidden, weight, labels, softcap):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with_entry(bench, monkeypatch, "peer", broken)
    monkeypatch.setattr(bench.session, "device_lost", lambda device: "an illegal memory access")
    status, record = run(bench, tmp_path)
    assert status == 1
    assert not record["complete"]
    assert [m["reason"] for m in record["missing"]][1:] == ["not reached"] * 5
    assert "the device is lost" in capsys.readouterr().out


def test_a_gpu_run_is_timed_by_events_after_a_flush_of_its_cache(bench, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.5

    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132, total_memory=80 << 30)
    cuda = SimpleNamespace(
        get_device_properties=lambda device: properties,
        get_device_name=lambda device: "GPU X",
        get_device_capability=lambda device: (9, 0),
        synchronize=lambda: log.append("wait"),
        memory_allocated=lambda: 7 << 20,
        reset_peak_memory_stats=lambda: log.append("reset"),
        max_memory_allocated=lambda: 19 << 20,
        Event=Event,
    )
    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    sizes = []
    empty = lambda size, **_: sizes.append(size) or flush  # noqa: E731
    monkeypatch.setattr(bench.timing, "torch", SimpleNamespace(cuda=cuda, empty=empty, int8=torch.int8))
    timer = bench.timing.Timer("cuda")
    assert sizes == [100 << 20]
    assert timer.once(lambda: log.append("run")) == 1.5
    assert log == ["wait", "flush", "event", "run", "event", "wait"]
    log.clear()
    assert bench.timing.peak_mib(lambda: log.append("run"), "cuda") == 12.0
    assert log == ["wait", "reset", "run", "wait"]

    fake = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"), __version__="2", get_num_threads=lambda: 1)
    monkeypatch.setattr(bench.conditions, "torch", fake)
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0")
    found = bench.conditions.environment("cuda", "command", "abc")
    assert (found["device"], found["capability"], found["cuda"], found["commit"]) == ("GPU X", "9.0", "13.0", "abc")
    assert found["memory_gib"] == 80.0
    assert found["settings"]["FASTDPO_KEEP_MB"] == "0"


def test_settings_hold_for_forward_and_backward_and_are_restored(bench, monkeypatch):
    monkeypatch.setenv("FASTDPO_GEMM", "auto")
    monkeypatch.delenv("FASTDPO_OTHER", raising=False)
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logp):
            seen.append(os.environ["FASTDPO_GEMM"])
            return logp.clone()

        @staticmethod
        def backward(ctx, upstream):
            seen.append(os.environ["FASTDPO_OTHER"])
            return upstream

    settings = {"FASTDPO_GEMM": "cublas", "FASTDPO_OTHER": "1"}
    entry = bench.entries.Entry("e", "", lambda h, w, y, c: Watch.apply(bench.peers.eager(h, w, y)), settings)
    logprobs(bench, 4, 4, 9, torch.float32).step(entry, "frozen")
    assert seen == ["cublas", "1"]
    assert os.environ["FASTDPO_GEMM"] == "auto"
    assert "FASTDPO_OTHER" not in os.environ


def test_a_forced_form_that_takes_the_defaults_path_is_not_timed_twice(bench, tmp_path):
    _, record = run(bench, tmp_path, "--entries", "fastdpo,fastdpo cublas,eager", "--quick")
    assert {row["entry"] for row in record["rows"]} == {"fastdpo", "eager"}
    assert {(m["entry"], m["reason"]) for m in record["missing"]} == {("fastdpo cublas", "the default's own path")}


def test_absent_peers_are_named_once_and_unknown_ones_refused(bench, tmp_path, caplog, capsys):
    def absent(name):
        raise bench.entries.LeftOut("not installed (pip install peer)")

    def broken(name):
        raise OSError("libpeer.so: cannot open shared object file")

    factories = [*bench.peers.FACTORIES[:1], bench.entries.Factory("peer", absent), bench.entries.Factory("b", broken)]
    assert list(bench.entries.found(factories, "cpu")) == ["fastdpo"]
    assert "peer: left out: not installed (pip install peer)" in caplog.text
    assert "b: left out: OSError: libpeer.so: cannot open shared object file" in caplog.text
    with pytest.raises(SystemExit):
        bench.run.main(["linear_logprob", "--device", "cpu", "--entries", "fastdpo,fastgpo"])
    assert "no entry is named 'fastgpo'; choose from fastdpo, " in capsys.readouterr().err


def test_obstacles(bench):
    entry = bench.entries.Entry("e", "", bench.peers.eager, softcap=False, dtypes=("bf16",))
    assert entry.obstacle("bf16", None) is None
    assert entry.obstacle("bf16", 30.0) == "it has no softcap"
    assert entry.obstacle("fp32", None) == "it takes bf16 only"


def test_torchs_own_op_is_compared_where_it_exists(bench):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.13 has it")
    entry = bench.entries.found(bench.peers.FACTORIES, "cpu", ["torch"])["torch"]
    comparison = logprobs(bench, 40, 16, 700, torch.float32)
    assert bench.truth.passes(comparison.truth.errors(comparison.step(entry, "trained")), comparison.eager_errors)


def test_bytes_of_tiles_are_those_counted_by_hand(bench):
    own, trl = bench.bounds.own_bytes, bench.bounds.trl_bytes
    unfused = [own(path, False, 2) for path in ("stats", "one_pass", "kept", "recompute")]
    assert unfused == [12, 16, 22, 28]
    assert [own(path, True, 2) for path in ("stats", "one_pass", "kept", "recompute")] == [0, 4, 10, 8]
    assert [trl(mode, 2) for mode in bench.cases.MODES] == [4, 12, 14]


def test_a_bound_is_gemms_at_their_rate_and_tiles_at_the_copy_rate(bench):
    # Llama-3.1-8B's head, 4096 tokens, frozen, at 650 TF/s and 3.0 TB/s
    n, h, v = 4096, 4096, 128256
    fused = bench.bounds.Work(4.0 * n * h * v, 4 * n * v)
    assert fused.bound_ms(650, 3000) == pytest.approx(13.242 + 0.700, abs=2e-3)
    trl = bench.bounds.peer_work("trl", "frozen", n, h, v, 2)
    assert trl.bound_ms(650, 3000) == pytest.approx(19.863 + 2.101, abs=2e-3)
    unfused = bench.bounds.Work(4.0 * n * h * v, 16 * n * v)
    assert trl.bound_ms(650, 3000) / unfused.bound_ms(650, 3000) == pytest.approx(1.37, abs=0.01)
    assert trl.bound_ms(650, 3000) / fused.bound_ms(650, 3000) == pytest.approx(1.58, abs=0.01)
    assert bench.bounds.peer_work("cce", "frozen", n, h, v, 2) is None  # its filter decides
    assert bench.bounds.peer_work("eager", "frozen", n, h, v, 2).bound_ms(650, 3000) is None
    assert trl.bound_ms(None, 3000) is None
    both = fused + bench.bounds.Work(2.0 * n * h * v, 0)
    assert (both.flops, both.tile_bytes) == (6.0 * n * h * v, 4 * n * v)


def test_the_summary_stands_beside_trl(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.run, "SUMMARY_TOKENS", 40)
    case = bench.cases.Case(40, 16, 700, "bf16", "frozen", head="toy head")
    report = bench.report.Report(None, "linear_logprob", {}, [case])
    ceilings = {"gemm_tflops": 1e-3, "copy_gbs": 1.0}
    unit = 2.0 * 40 * 16 * 700
    for entry, work, ms, peak in (
        ("fastdpo", bench.bounds.Work(2 * unit, 16 * 40 * 700), 4.0, 1.0),
        ("trl", bench.bounds.Work(3 * unit, 12 * 40 * 700), 6.0, 4.0),
    ):
        row = bench.measure.Row(case.name, entry, "", {"logp": 0.0}, {}, [ms], peak, work=work, ceilings=ceilings)
        report.add(case, [row], [])
    (line,) = bench.report.over_trl(report, 40).splitlines()[1:]
    own, trl = 2 * unit / 1e6 + 0.448, 3 * unit / 1e6 + 0.336
    assert line.split() == f"toy head bf16 frozen fastdpo 1.50 x {trl / own:.2f} x {own / 4:.0%} 0.25".split()


def test_real_activations_are_stored_and_measured(bench, tmp_path, monkeypatch, capsys):
    from fastdpo.demo import demo_paths

    demo, path = demo_paths(), tmp_path / "activations.safetensors"
    pairs = tmp_path / "few.jsonl"
    pairs.write_text("\n".join(demo.train.read_text().splitlines()[:8]) + "\n")
    assert bench.real.main([str(demo.model), "--pairs", str(pairs), "--tokens", "48", "--out", str(path)]) == 0
    n, h, v = bench.real.shape(path)
    assert n == 48
    hidden, weight, labels = bench.real.load(path, 20, "cpu")
    assert (hidden.shape, weight.shape, labels.shape) == ((20, h), (v, h), (20,))
    # a model that was trained on such answers finds them likely
    logp = bench.peers.eager(hidden, weight, labels)
    assert float(logp.mean()) > -3
    status, record = run(bench, tmp_path, "--quick", "--entries", "fastdpo,eager", "--real", str(path))
    assert status == 0
    assert [row["case"] for row in record["rows"]][-1] == f"48x{h}x{v} bf16 trained real"
    path.write_bytes(b"no tensors")
    with pytest.raises(SystemExit):
        bench.run.main(["linear_logprob", "--device", "cpu", "--real", str(path)])
    assert "holds no activations" in capsys.readouterr().err


def test_tune_times_what_passes_and_names_what_does_not(bench, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where a CUDA device is")
    own = bench.tune.candidates("interpreter")[0]
    wrong = replace(own, group=own.group + 1)
    step, override, forced = bench.linear_logprob.Logprobs.step, bench.tune.override, []

    @contextmanager
    def watched(config):
        with override(config):
            forced.append(config)
            yield
            forced.pop()

    def sabotaged(self, entry, mode):
        outputs = step(self, entry, mode)
        return {name: x + 1 for name, x in outputs.items()} if forced == [wrong] else outputs

    monkeypatch.setattr(bench.tune, "override", watched)
    monkeypatch.setattr(bench.linear_logprob.Logprobs, "step", sabotaged)
    monkeypatch.setattr(bench.tune, "candidates", lambda arch: [own, wrong])
    monkeypatch.setattr(bench.tune, "SHAPES", [(20, 16, 70)])
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--tune", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d +products in cuBLAS", printed)
    assert re.search(rf"\d\.\d+ +\d+\.\d+  {re.escape(repr(own))}", printed)
    assert re.search(rf"{re.escape(repr(wrong))}  H 16, forward: failed the oracle", printed)
    assert "nothing here is for kernels/configs.py" in printed


def test_tune_offers_a_default_only_where_every_mode_is_faster(bench):
    config = bench.tune.candidates("sm_90")[0]
    times = {(896, "forward"): 1.0, (896, "frozen"): 2.0, (4096, "forward"): 5.0, (4096, "frozen"): 9.0}
    best = bench.tune.Candidate(config, dict(times))
    blas = bench.tune.Candidate(None, {**times, (896, "forward"): 1.5, (896, "frozen"): 2.5, (4096, "frozen"): 10.0})
    rows = bench.tune.config_rows(blas, best, "sm_90", [896, 4096], {"gpu": "G", "date": "D", "command": "C"})
    assert rows == [
        f"FOLD['sm_90'] = {config!r}",
        "Measured('sm_90', torch.bfloat16, range(896, 897), gpu='G', date='D', command='C')",
        "# H 4096: not faster than cuBLAS in every mode, no row",
    ]


def cuda_file(folder: Path, case: str, **shape: object) -> Path:
    """A result file as a run on a GPU leaves it."""
    rows = [
        {"case": f"{mode}", "entry": entry, "version": f"{entry} 1", "dtype": "bf16", "mode": mode, "head": "Toy-1B"}
        | {"h": 64, "v": 900, "error": {"logp": 1e-5}, "peak_mib": peak, "best_ms": ms - 0.5, "median_ms": ms, **shape}
        for mode in ("frozen", "trained")
        for entry, ms, peak in (("fastdpo", 2.0, 10.0), ("trl", 3.0, 40.0), ("liger", 4.0, 80.0))
        if (mode, entry) != ("trained", "liger")
    ]
    environment = {"device": "GPU X", "driver": "580", "cuda": "13.0", "torch": "2.13", "commit": "abc", "date": "D"}
    missing = [{"case": "trained", "entry": "liger", "reason": "out of memory"}]
    record = {"rows": rows, "environment": {**environment, "command": "C"}, "missing": missing, "complete": True}
    path = folder / f"{case}_cuda_20990101.json"
    path.write_text(json.dumps(record))
    return path


def test_a_gpus_table_says_what_was_measured_and_what_was_not(bench, tmp_path):
    lines = bench.tables.cuda_table(cuda_file(tmp_path, "linear_logprob", n=4096)).splitlines()
    assert lines[2] == (
        "| Toy-1B (64 x 900) frozen | 2.00, 10, 1e-05 | 3.00 (1.50 x), 40, 1e-05 | 4.00 (2.00 x), 80, 1e-05 |"
    )
    assert lines[3] == "| Toy-1B (64 x 900) trained | 2.00, 10, 1e-05 | 3.00 (1.50 x), 40, 1e-05 | out of memory |"
    assert lines[5] == (
        "4096 scored tokens, bf16, medians; GPU X, driver 580, CUDA 13.0; torch 2.13; fastdpo 1, trl 1, liger 1; "
        "commit abc; D; `C`. Not everything was measured: linear_logprob_cuda_20990101.json says what."
    )


def test_readme_has_gpu_tables_only_where_there_are_results(bench, tmp_path, monkeypatch):
    tables = bench.tables
    readme = f"before\n\n{tables.START}\nold\n{tables.END}\n\nafter\n"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    empty = tables.rendered(readme)
    assert empty == f"before\n\n{tables.START}\n{tables.END}\n\nafter\n"
    cuda_file(tmp_path, "linear_logprob", n=4096)
    one = tables.rendered(readme)
    assert one.startswith(f"before\n\n{tables.START}\n{tables.END}\n\n{tables.CUDA_START}\n| head, mode |")
    assert one.endswith(f"{tables.END}\n\nafter\n")
    assert tables.rendered(one) == one
    other = cuda_file(tmp_path, "dpo_loss", pairs=4, length=1024)
    both = tables.rendered(one)
    assert both.count("| head, mode |") == 2
    assert "4 pairs of 1024 positions, bf16" in both
    assert tables.rendered(both) == both
    other.unlink()
    assert tables.rendered(both) == one
    next(iter(tmp_path.glob("*"))).unlink()
    assert tables.rendered(one) == empty


def test_a_cpu_run_renders_as_a_table(bench, tmp_path):
    run(bench, tmp_path, "--rounds", "1", "--quick")
    (path,) = tmp_path.glob("*.json")
    table = bench.tables.table(path)
    assert table.count("\n| 40x16x700") == 6
    assert "these ratios are CPU ratios" in table


def test_cuda_without_a_device_is_refused_with_words(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit):
        bench.run.main(["linear_logprob", "--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_no_rounds_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.run.main(["linear_logprob", "--device", "cpu", "--rounds", "0"])
    assert "--rounds: at least 1, got 0." in capsys.readouterr().err
