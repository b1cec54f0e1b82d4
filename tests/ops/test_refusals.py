"""What is refused gets one sentence, and the path that is taken is logged."""

import math

import pytest
import torch

from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.randn(9, 5)}, r"weight must be \(V, 4\) to match hidden \(3, 4\), got \(9, 5\)"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be \(3,\) .* got \(2,\); pass `rows`"),
        ({"labels": torch.zeros(3)}, r"labels must be int64, got torch.float32; call .long\(\)"),
        ({"labels": torch.tensor([0, 9, 1])}, r"label 9 is outside the vocabulary \[0, 9\)"),
        ({"labels": torch.tensor([0, -1, 1])}, r"label -1 is outside .* ignore_index=-100"),
        ({"hidden": torch.randn(3, 4).bfloat16()}, r"hidden is torch.bfloat16 and weight torch.float32; cast one"),
        ({"weight": torch.zeros(9, 4, dtype=torch.uint8)}, r"weight must be .* got torch.uint8; dequantize"),
        ({"bias": torch.randn(4)}, r"bias must be \(9,\) to match weight, got \(4,\)"),
        ({"rows": torch.tensor([0, 1, 3])}, r"rows must be in \[0, 3\), got values from 0 to 3"),
        ({"rows": torch.tensor([0, 1])}, r"labels and rows must both be \(M,\)"),
        ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0.0"),
        ({"softcap": -1.0}, r"softcap must be > 0 and finite, or None, got -1.0"),
        ({"softcap": math.inf}, r"softcap must be > 0 and finite, or None, got inf"),
        ({"logit_scale": math.nan}, r"logit_scale must be finite, got nan"),
        ({"hidden": torch.randn(3, 0), "weight": torch.randn(9, 0)}, r"hidden \(3, 0\) has no features"),
        ({"rows": torch.tensor([0, 1, 2]), "shift": True}, r"shift=True and rows exclude each other"),
    ],
)
def test_bad_arguments_get_one_sentence(change, words):
    arguments = {"hidden": torch.randn(3, 4), "weight": torch.randn(9, 4), "labels": torch.tensor([0, 1, 2]), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        linear_logprob(**arguments)


def test_bad_names_get_one_sentence():
    operands = torch.randn(1, 2), torch.randn(3, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="unknown name 'entropi'; choose from entropy"):
        linear_logprob_stats(*operands, stats=("entropi",))
    assert linear_logprob_stats(*operands, stats="lse").lse is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        linear_logprob_plan(*operands, sofcap=3.0)


def test_backend_switch_refuses_with_words(monkeypatch):
    arguments = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])
    monkeypatch.setenv("FASTDPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, triton, tiled, reference, got 'cuda'"):
        linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="float64"):
        linear_logprob(arguments[0].double(), arguments[1].double(), arguments[2])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    by_reference = linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "auto")
    assert torch.allclose(linear_logprob(*arguments), by_reference, atol=1e-6)


def test_the_path_taken_is_logged(caplog):
    with caplog.at_level("DEBUG", "fastdpo"):
        linear_logprob(torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2]))
    assert "tiled backend, stats: tiles of 3 x 9" in caplog.text
