"""Cases and inputs: order of importance, peaked logits, prompt-shaped masks, entries that are left out."""

import os

import pytest
import torch

from fastdpo.ops import oracle


def test_inputs_are_peaked(bench):
    hidden, weight, labels = oracle.peaked_inputs(200, 64, 4000, torch.float32, "cpu")
    p = torch.softmax(hidden @ weight.t(), -1).gather(1, labels[:, None])
    assert float((p > 0.9).float().mean()) > 0.3
    assert float((p < 0.1).float().mean()) > 0.1


def test_masks_are_prompt_shaped(bench):
    cases = bench.dpo_loss.cases
    pairs = cases.PairInputs.of(cases.PairCase(3, 64, 8, 90, "bf16", "frozen"), "cpu")
    scored = pairs.labels != cases.IGNORE
    first = scored.int().argmax(1)
    assert torch.equal(first[:3], first[3:])  # a pair shares its prompt
    assert int(first.min()) >= 16
    assert torch.equal(scored.sum(1), pairs.offsets.diff())
    assert bool((scored.int().diff(dim=1).abs().sum(1) <= 2).all())  # one stretch in each row
    assert torch.equal(pairs.labels[scored], pairs.targets)
    assert not bool(scored[:, -1].all())  # padding


def test_the_cases_of_a_gpu_come_in_order_of_importance(bench):
    cases = bench.linear_logprob.cases.logprob_cases("cuda", quick=False, real=(4096, 576, 49152))
    heads = bench.linear_logprob.cases.HEADS
    turn = 3 * len(heads)  # over the heads, in three modes
    assert {c.head for c in cases[:turn]} == heads.keys()
    assert {(c.n, c.dtype) for c in cases[:turn]} == {(4096, "bf16")}
    assert [c.inputs for c in cases[turn : turn + 3]] == ["real"] * 3
    assert [c.n for c in cases[turn + 3 : -6]] == [1024] * turn + [16384] * turn
    assert [c.dtype for c in cases[-6:]] == ["fp16"] * 3 + ["fp32"] * 3
    assert len({c.name for c in cases}) == len(cases)
    assert next(c for c in cases if c.head == "Gemma-2-2B").softcap == 30.0


def test_absent_peers_are_named_once_and_unknown_ones_refused(bench, tmp_path, caplog, capsys):
    def absent(name):
        raise bench.measure.entries.LeftOut("not installed (pip install peer)")

    def broken(name):
        raise OSError("libpeer.so: cannot open shared object file")

    own, make = bench.linear_logprob.peers.FACTORIES[0], bench.measure.entries.Factory
    factories = [own, make("peer", absent), make("b", broken)]
    assert list(bench.measure.entries.make_entries(factories, "cpu")) == ["fastdpo"]
    assert "peer: left out: not installed (pip install peer)" in caplog.text
    assert "b: left out: OSError: libpeer.so: cannot open shared object file" in caplog.text
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--entries", "fastdpo,fastgpo"]) == 2
    assert "no entry is named 'fastgpo'; choose from fastdpo, " in capsys.readouterr().err


def test_obstacles(bench):
    entry = bench.measure.entries.Entry("e", "", bench.linear_logprob.peers.eager, softcap=False, dtypes=("bf16",))
    assert entry.obstacle("bf16", None) is None
    assert entry.obstacle("bf16", 30.0) == "it has no softcap"
    assert entry.obstacle("fp32", None) == "it takes bf16 only"


def test_torchs_own_op_is_compared_where_it_exists(bench):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.13 has it")
    entry = bench.measure.entries.make_entries(bench.linear_logprob.peers.FACTORIES, "cpu", ["torch"])["torch"]
    comparison = bench.logprobs(40, 16, 700, torch.float32)
    assert oracle.passes(comparison.truth.errors(comparison.step(entry, "trained")), comparison.eager_errors)


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
    entry = bench.measure.entries.Entry(
        "e", "", lambda h, w, y, c: Watch.apply(bench.linear_logprob.peers.eager(h, w, y)), settings
    )
    bench.logprobs(4, 4, 9, torch.float32).step(entry, "frozen")
    assert seen == ["cublas", "1"]
    assert os.environ["FASTDPO_GEMM"] == "auto"
    assert "FASTDPO_OTHER" not in os.environ
