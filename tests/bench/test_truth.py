"""The oracle: fp64 written by hand is autograd's, and refuses a wrong entry."""

from dataclasses import replace

import pytest
import torch

from fastdpo.ops import oracle


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_truth_is_autograds_in_fp64(bench, softcap):
    comparison = bench.logprobs(300, 8, 5000, torch.float64, softcap)

    def exact(hidden, weight, labels, softcap):
        z = hidden @ weight.t()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z, -1).gather(1, labels[:, None])[:, 0]

    outputs = comparison.step(replace(bench.linear_logprob.peers.EAGER, run=exact), "trained")
    assert len(outputs) == 3
    assert all(error < 1e-12 for error in comparison.truth.errors(outputs).values())
    assert comparison.truth.row_errors(outputs)["max"] < 1e-12


def test_the_truth_of_pairs_is_autograds_in_fp64(bench):
    cases = bench.dpo_loss.cases
    pairs = cases.PairInputs.of(cases.PairCase(3, 20, 8, 900, "fp32", "trained"), "cpu")
    wide = cases.PairInputs(pairs.hidden.double(), pairs.ref_hidden.double(), pairs.weight.double(), pairs.labels)
    comparison = bench.dpo_loss.step.LossComparison(wide)

    def exact(pairs, hidden, weight):
        scored = pairs.labels != cases.IGNORE

        def sums(states, head):
            logp = torch.log_softmax(states @ head.t(), -1)
            return (logp.gather(-1, pairs.labels.clamp(min=0)[..., None])[..., 0] * scored).sum(1)

        rewards = cases.BETA * (sums(hidden, weight) - sums(pairs.ref_hidden, pairs.weight).detach())
        chosen, rejected = rewards.chunk(2)
        return torch.log1p(torch.exp(rejected - chosen)).mean(), rewards

    outputs = comparison.step(replace(bench.dpo_loss.peers.EAGER, run=exact), "trained")
    error = comparison.truth.errors(outputs)
    assert error.pop("rewards") < 1e-6  # carried in fp32
    assert set(error) == {"dh", "dw"}
    assert all(e < 1e-12 for e in error.values())


@pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
def test_every_entry_passes_the_oracle_and_a_wrong_one_does_not(bench, mode):
    comparison = bench.logprobs(64, 32, 900, torch.bfloat16)
    entries = bench.measure.entries.make_entries(bench.linear_logprob.peers.FACTORIES, "cpu")
    assert entries.keys() >= {"fastdpo", "eager", "trl"}
    by_eager = comparison.eager_errors
    for name, entry in entries.items():
        error = comparison.truth.errors(comparison.step(entry, mode))
        assert len(error) == {"forward": 1, "frozen": 2, "trained": 3}[mode]
        assert oracle.passes(error, by_eager), name

    def wrong(hidden, weight, labels, softcap):
        return bench.linear_logprob.peers.eager(hidden, weight, labels) * 1.05

    error = comparison.truth.errors(comparison.step(replace(entries["eager"], run=wrong), mode))
    assert not oracle.passes(error, by_eager)


def test_an_entry_that_leaves_out_a_gradient_is_no_answer(bench):
    def no_dw(hidden, weight, labels, softcap):
        return bench.linear_logprob.peers.eager(hidden, weight.detach(), labels)

    comparison = bench.logprobs(40, 16, 700, torch.float32)
    entry = replace(bench.linear_logprob.peers.EAGER, run=no_dw)
    assert set(comparison.step(entry, "frozen")) == {"logp", "dh"}
    with pytest.raises(RuntimeError, match="it gives no dw"):
        comparison.step(entry, "trained")


def test_what_is_not_sampled_must_be_finite_all_the_same(bench):
    comparison = bench.logprobs(300, 8, 500, torch.float32)
    outputs = comparison.step(bench.linear_logprob.peers.EAGER, "frozen")
    sampled = comparison.truth.rows["dh"].tolist()
    hole = next(i for i in range(300) if i not in sampled)
    outputs["dh"][hole, 3] = float("nan")
    assert comparison.truth.errors(outputs)["dh"] == float("inf")


def test_eager_in_blocks_errs_as_eager_at_once(bench, monkeypatch):
    at_once = bench.logprobs(300, 16, 900, torch.bfloat16).eager_errors
    monkeypatch.setattr(bench.linear_logprob.step, "BLOCK", 128)
    in_blocks = bench.logprobs(300, 16, 900, torch.bfloat16).eager_errors
    assert in_blocks["logp"] == at_once["logp"]
    assert all(0.5 < in_blocks[name] / at_once[name] < 2 for name in at_once)
