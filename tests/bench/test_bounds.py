"""FLOPs and bytes: what is counted by hand, what operators move, and bounds at measured rates."""

import pytest
import torch


def test_bytes_of_tiles_are_those_counted_by_hand(bench):
    own, trl = bench.measure.bounds.own_bytes, bench.measure.bounds.trl_bytes
    unfused = [own(path, False, 2) for path in ("stats", "one_pass", "kept", "recompute")]
    assert unfused == [12, 16, 22, 28]
    assert [own(path, True, 2) for path in ("stats", "one_pass", "kept", "recompute")] == [0, 4, 10, 8]
    assert [trl(mode, 2) for mode in bench.linear_logprob.cases.MODES] == [4, 12, 14]


def test_a_bound_is_gemms_at_their_rate_and_tiles_at_the_copy_rate(bench):
    # Llama-3.1-8B's head, 4096 tokens, frozen, at 650 TF/s and 3.0 TB/s
    n, h, v = 4096, 4096, 128256
    fused = bench.measure.bounds.Work(4.0 * n * h * v, 4 * n * v)
    assert fused.bound_ms(650, 3000) == pytest.approx(13.242 + 0.700, abs=2e-3)
    trl = bench.measure.bounds.peer_work("trl", "frozen", n, h, v, 2)
    assert trl.bound_ms(650, 3000) == pytest.approx(19.863 + 2.101, abs=2e-3)
    unfused = bench.measure.bounds.Work(4.0 * n * h * v, 16 * n * v)
    assert trl.bound_ms(650, 3000) / unfused.bound_ms(650, 3000) == pytest.approx(1.37, abs=0.01)
    assert trl.bound_ms(650, 3000) / fused.bound_ms(650, 3000) == pytest.approx(1.58, abs=0.01)
    assert bench.measure.bounds.peer_work("cce", "frozen", n, h, v, 2) is None  # its filter decides
    assert bench.measure.bounds.peer_work("liger", "frozen", n, h, v, 2).bound_ms(650, 3000) is None
    assert bench.measure.bounds.peer_work("eager", "frozen", n, h, v, 2, 30.0).bound_ms(650, 3000) is None
    assert trl.bound_ms(None, 3000) is None
    both = fused + bench.measure.bounds.Work(2.0 * n * h * v, 0)
    assert (both.flops, both.tile_bytes) == (6.0 * n * h * v, 4 * n * v)


def test_the_summary_stands_beside_trl(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.benchmark, "SUMMARY_TOKENS", 40)
    case = bench.linear_logprob.cases.Case(40, 16, 700, "bf16", "frozen", head="toy head")
    report = bench.record.Report(None, "linear_logprob", {}, [case])
    ceilings = {"gemm_tflops": 1e-3, "copy_gbs": 1.0}
    unit = 2.0 * 40 * 16 * 700
    for entry, work, ms, peak in (
        ("fastdpo", bench.measure.bounds.Work(2 * unit, 16 * 40 * 700), 4.0, 1.0),
        ("trl", bench.measure.bounds.Work(3 * unit, 12 * 40 * 700), 6.0, 4.0),
    ):
        row = bench.measure.rows.Row(case.name, entry, "", {"logp": 0.0}, {}, [ms], peak, work=work, ceilings=ceilings)
        report.add(case, [row], [])
    (line,) = bench.show.terminal.over_trl(report, 40).splitlines()[1:]
    own, trl = 2 * unit / 1e6 + 0.448, 3 * unit / 1e6 + 0.336
    assert line.split() == f"toy head bf16 frozen fastdpo 1.50 x {trl / own:.2f} x {own / 4:.0%} 0.25".split()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_of_eager_are_those_that_its_operators_move(bench, dtype):
    # a small H: hidden states and weight, which the count by hand leaves out, are a few per cent here
    n, v = 512, 4096
    comparison = bench.logprobs(n, 8, v, bench.linear_logprob.cases.DTYPES[dtype])
    for mode in bench.linear_logprob.cases.MODES:
        with bench.measure.traffic.Traffic() as traffic:
            comparison.step(bench.linear_logprob.peers.EAGER, mode)
        wanted = bench.measure.bounds.eager_bytes(mode, comparison.hidden.element_size()) * n * v
        assert wanted <= traffic.bytes < 1.03 * wanted, mode


def test_operators_are_counted_by_what_they_read_and_write(bench):
    def moved(run):
        with bench.measure.traffic.Traffic() as traffic:
            run()
        return traffic.bytes

    x, row, at = torch.zeros(6, 10), torch.zeros(10), torch.zeros(6, 1, dtype=torch.int64)
    assert moved(lambda: x + x) == 3 * 240
    assert moved(lambda: x.add_(row)) == 2 * 240 + 40
    assert moved(lambda: x.t().view(10, 6)[2:4]) == 0
    assert moved(lambda: x.new_empty(6, 10)) == 0
    assert moved(lambda: x.copy_(row)) == 240 + 40
    assert moved(lambda: torch.mul(x, 2.0, out=x.new_empty(6, 10))) == 2 * 240
    assert moved(lambda: x.gather(1, at)) == 48 + 2 * 24
    assert moved(lambda: row.expand(6, 10).sum()) == 40 + 4
    assert moved(lambda: x.sum(0)) == 240 + 40
