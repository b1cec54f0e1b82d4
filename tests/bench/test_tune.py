"""The sweep over the fused kernels' tiles."""

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def tune(bench):
    return bench.linear_logprob.tune


def test_tune_times_what_passes_and_names_what_does_not(bench, tune, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where a CUDA device is")
    own = tune.candidates("interpreter")[0]
    wrong = replace(own, group=own.group + 1)
    comparison = bench.linear_logprob.step.LogprobComparison
    step, override, forced = comparison.step, tune.override, []

    @contextmanager
    def watched(config):
        with override(config):
            forced.append(config)
            yield
            forced.pop()

    def sabotaged(self, entry, mode):
        outputs = step(self, entry, mode)
        return {name: x + 1 for name, x in outputs.items()} if forced == [wrong] else outputs

    monkeypatch.setattr(tune, "override", watched)
    monkeypatch.setattr(comparison, "step", sabotaged)
    monkeypatch.setattr(tune, "candidates", lambda arch: [own, wrong])
    monkeypatch.setattr(tune, "SHAPES", [(20, 16, 70)])
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--tune", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d +products in cuBLAS", printed)
    assert re.search(rf"\d\.\d+ +\d+\.\d+  {re.escape(repr(own))}", printed)
    assert re.search(rf"{re.escape(repr(wrong))}  H 16, forward: failed the oracle", printed)
    assert "nothing here is for kernels/configs.py" in printed


def test_tune_offers_a_default_only_where_every_mode_is_faster(tune):
    config = tune.candidates("sm_90")[0]
    times = {(896, "forward"): 1.0, (896, "frozen"): 2.0, (4096, "forward"): 5.0, (4096, "frozen"): 9.0}
    best = tune.Candidate(config, dict(times))
    blas = tune.Candidate(None, {**times, (896, "forward"): 1.5, (896, "frozen"): 2.5, (4096, "frozen"): 10.0})
    rows = tune.config_rows(blas, best, "sm_90", [896, 4096], {"gpu": "G", "date": "D", "command": "C"})
    assert rows == [
        f"FOLD['sm_90'] = {config!r}",
        "Measured('sm_90', torch.bfloat16, range(896, 897), gpu='G', date='D', command='C')",
        "# H 4096: not faster than cuBLAS in every mode, no row",
    ]
