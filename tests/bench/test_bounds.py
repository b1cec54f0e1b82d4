"""FLOPs and bytes: what is counted by hand, what operators move, and bounds at measured rates."""

import sys
from types import SimpleNamespace

import pytest
import torch

# products of N x H x V in a forward, with d hidden, and with d weight, as the peers' sources do it
PRODUCTS = {
    "eager": (1, 2, 3),
    "compile": (1, 2, 3),
    "trl": (1, 3, 4),
    "torch": (1, 3, 4),
    "liger": (1, 3, 4),
    "liger scaled": (1, 4, 4),
    "cce": None,  # its filter decides
    "cce exact": (1, 3, 4),
    "verl": (1, 4, 4),
}


@pytest.fixture
def bounds(bench):
    return bench.measure.bounds


def test_bytes_of_tiles_are_those_counted_by_hand(bench, bounds):
    own, trl = bounds.own_bytes, bounds.trl_bytes
    unfused = [own(path, False, 2) for path in ("stats", "one_pass", "kept", "recompute")]
    assert unfused == [12, 16, 22, 28]
    assert [own(path, True, 2) for path in ("stats", "one_pass", "kept", "recompute")] == [0, 4, 10, 8]
    assert [trl(mode, 2) for mode in bench.linear_logprob.cases.MODES] == [4, 12, 14]


def test_a_bound_is_gemms_at_their_rate_and_tiles_at_the_copy_rate(bench, bounds):
    # Llama-3.1-8B's head, 4096 tokens, frozen, at 650 TF/s and 3.0 TB/s
    n, h, v = 4096, 4096, 128256
    fused = bounds.Work(4.0 * n * h * v, 4 * n * v)
    assert fused.bound_ms(650, 3000) == pytest.approx(13.242 + 0.700, abs=2e-3)

    def work(tile_bytes, softcap=None):
        peer = bench.measure.entries.Entry("peer", "", print, products={"frozen": 3}, tile_bytes=tile_bytes)
        return bounds.peer_work(peer, "frozen", n, h, v, 2, softcap)

    trl = work(bounds.trl_bytes)
    assert trl.bound_ms(650, 3000) == pytest.approx(19.863 + 2.101, abs=2e-3)
    unfused = bounds.Work(4.0 * n * h * v, 16 * n * v)
    assert trl.bound_ms(650, 3000) / unfused.bound_ms(650, 3000) == pytest.approx(1.37, abs=0.01)
    assert trl.bound_ms(650, 3000) / fused.bound_ms(650, 3000) == pytest.approx(1.58, abs=0.01)
    assert bounds.peer_work(bench.measure.entries.Entry("cce", "", print), "frozen", n, h, v, 2) is None
    assert work(None).bound_ms(650, 3000) is None  # Liger's tiles are not counted
    assert work(bounds.eager_bytes, 30.0).bound_ms(650, 3000) is None
    assert work(bounds.trl_bytes, 30.0) == trl
    assert trl.bound_ms(None, 3000) is None
    both = fused + bounds.Work(2.0 * n * h * v, 0)
    assert (both.flops, both.tile_bytes) == (6.0 * n * h * v, 4 * n * v)


def test_every_peer_says_what_its_algorithm_multiplies(bench, bounds, monkeypatch):
    class Verl:
        def forward(self, temperature):
            pass

    def cce(**options):
        pass

    for module, names in (
        ("trl.trainer", {"utils": SimpleNamespace(_ChunkedLogProbFunction=None, _CHUNKED_LOGPROB_CHUNK_SIZE=1)}),
        ("liger_kernel.transformers.functional", {"liger_fused_linear_cross_entropy": None}),
        ("liger_kernel.ops", {"LigerFusedLinearScaledCrossEntropyFunction": None}),
        ("cut_cross_entropy", {"linear_cross_entropy": cce}),
        ("verl.utils.kernel.linear_cross_entropy", {"LinearCrossEntropy": Verl}),
    ):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    peers = bench.linear_logprob.peers
    monkeypatch.setattr(peers, "installed", lambda package: f"{package} 1")
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", print, raising=False)
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", print, raising=False)
    entries = bench.measure.entries.make_entries(peers.FACTORIES, "cuda")
    assert list(entries)[:3] == ["fastdpo", "fastdpo cublas", "fastdpo triton"]
    assert {name: entries[name].products and tuple(entries[name].products.values()) for name in PRODUCTS} == PRODUCTS
    counted = {name: entries[name].tile_bytes for name in PRODUCTS if entries[name].tile_bytes is not None}
    assert counted == {"eager": bounds.eager_bytes, "trl": bounds.trl_bytes}


def test_the_summary_stands_beside_trl(bench, bounds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.benchmark, "SUMMARY_TOKENS", 40)
    case = bench.linear_logprob.cases.LogprobCase(40, 16, 700, "bf16", "frozen", head="toy head")
    record = bench.record.RunRecord(None, "linear_logprob", {}, [case])
    ceilings = {"gemm_tflops": 1e-3, "copy_gbs": 1.0}
    unit = 2.0 * 40 * 16 * 700
    for entry, work, ms, peak in (
        ("fastdpo", bounds.Work(2 * unit, 16 * 40 * 700), 4.0, 1.0),
        ("trl", bounds.Work(3 * unit, 12 * 40 * 700), 6.0, 4.0),
    ):
        row = bench.measure.rows.Row(case.name, entry, "", {"logp": 0.0}, {}, [ms], peak, work=work, ceilings=ceilings)
        record.add(case, [row], [])
    (line,) = bench.show.terminal.over_trl(record, 40).splitlines()[1:]
    own, trl = 2 * unit / 1e6 + 0.448, 3 * unit / 1e6 + 0.336
    assert line.split() == f"toy head bf16 frozen fastdpo 1.50 x {trl / own:.2f} x {own / 4:.0%} 0.25".split()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_of_eager_are_those_that_its_operators_move(bench, bounds, dtype):
    # a small H: hidden states and weight, which the count by hand leaves out, are a few per cent here
    n, v = 512, 4096
    comparison = bench.logprobs(n, 8, v, bench.linear_logprob.cases.DTYPES[dtype])
    for mode in bench.linear_logprob.cases.MODES:
        with bench.measure.traffic.Traffic() as traffic:
            comparison.step(bench.linear_logprob.peers.EAGER, mode)
        tiles = bounds.eager_bytes(mode, comparison.hidden.element_size()) * n * v
        assert tiles <= traffic.bytes < 1.03 * tiles, mode


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
