"""`fastdpo.integrations.liger` beside the real liger-kernel: signatures, every result, every gradient."""

import inspect
import itertools
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdpo.integrations import liger as ours

ROOT = Path(__file__).resolve().parents[2]
# Liger's cross-entropy is a Triton kernel: on the GPU where there is one, else under the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS, LENGTH, HIDDEN, VOCAB = 3, 7, 16, 53
AUX = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits", "nll", "chosen_reward", "rejected_reward")


@pytest.fixture(scope="module")
def liger() -> Any:
    """Real classes and function, under the names of ours."""
    try:
        losses, functional, modules = (
            import_module(f"liger_kernel.{name}")
            for name in ("chunked_loss", "transformers.functional", "transformers.fused_linear_cross_entropy")
        )
    except ImportError as error:
        if os.environ.get("FASTDPO_REQUIRE_DATA") == "1":
            pytest.fail(f"FASTDPO_REQUIRE_DATA=1 and liger-kernel does not import: {error}")
        pytest.skip(f"liger-kernel does not import: {error}")
    return type(
        "Liger",
        (),
        {
            "LigerFusedLinearDPOLoss": losses.LigerFusedLinearDPOLoss,
            "LigerFusedLinearCrossEntropyLoss": modules.LigerFusedLinearCrossEntropyLoss,
            "liger_fused_linear_cross_entropy": staticmethod(functional.liger_fused_linear_cross_entropy),
        },
    )


def operands(ignore_index: int = -100, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The same at every call: hidden states, heads and targets with prompts and completions of other lengths."""
    torch.manual_seed(1)
    target = torch.randint(1, VOCAB, (2 * PAIRS, LENGTH))
    target[:, :2] = ignore_index
    target[1, 5:] = ignore_index
    target[4, 3:] = ignore_index
    tensors = {
        "weight": 0.3 * torch.randn(VOCAB, HIDDEN),
        "hidden": torch.randn(2 * PAIRS, LENGTH, HIDDEN),
        "bias": torch.randn(VOCAB),
        "ref_hidden": torch.randn(2 * PAIRS, LENGTH, HIDDEN),
        "ref_weight": 0.3 * torch.randn(VOCAB, HIDDEN),
        "ref_bias": torch.randn(VOCAB),
        "target": target,
    }
    tensors = {name: x.to(device) for name, x in tensors.items()}
    for name in ("weight", "hidden", "bias"):
        tensors[name].requires_grad_()
    return tensors


def everything(
    cls: Any, *, bias: bool = True, ref: bool = True, ignore_index: int = -100, **options: Any
) -> dict[str, torch.Tensor]:
    """Loss, the seven other results, and the gradients under an upstream gradient of 2.5, by name."""
    x = operands(ignore_index)
    module = cls(compiled=False, use_ref_model=ref, ignore_index=ignore_index, **options)
    reference = (x["ref_hidden"], x["ref_weight"], x["ref_bias"] if bias else None) if ref else ()
    loss, aux = module(x["weight"], x["hidden"], x["target"], x["bias"] if bias else None, *reference)
    assert isinstance(aux, tuple)
    assert len(aux) == len(AUX)
    assert not any(one.requires_grad for one in aux)
    (2.5 * loss).backward()
    results = {"loss": loss.detach(), **dict(zip(AUX, aux, strict=True))}
    for name in ("hidden", "weight", *(("bias",) if bias else ())):
        results[f"grad of {name}"] = x[name].grad
    return results


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], case: object) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert bool(expected.isfinite().all()), (case, name)
        torch.testing.assert_close(mine[name], expected, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{case} {n}: {m}")


@pytest.mark.parametrize(
    "name", ["LigerFusedLinearDPOLoss", "LigerFusedLinearCrossEntropyLoss", "liger_fused_linear_cross_entropy"]
)
def test_signatures_are_ligers(liger: Any, name: str):
    def parameters(thing: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(thing).parameters.values()]

    mine, theirs = getattr(ours, name), getattr(liger, name)
    assert parameters(mine) == parameters(theirs)
    if inspect.isclass(mine):
        assert parameters(mine.forward) == parameters(theirs.forward)
        set_by_the_constructor = vars(theirs()).keys() - vars(torch.nn.Module()).keys()
        assert set_by_the_constructor <= vars(mine()).keys()


def test_every_loss_type_of_ligers_is_there(liger: Any):
    assert set(ours.LOSS_TYPES) - {"ipo"} == liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("loss_type", [name for name in ours.LOSS_TYPES if name != "ipo"])
def test_numbers_are_ligers(liger: Any, loss_type: str, average: bool):
    smoothing = 0.1 if loss_type in ours.SMOOTHED else 0.0
    for nll, bias, ref in itertools.product((False, True), repeat=3):
        options = {
            "loss_type": loss_type,
            "average_log_prob": average,
            "compute_nll_loss": nll,
            "alpha": 0.7,
            "beta": 0.2,
            "label_smoothing": smoothing,
            "discopop_tau": 0.3,
            "bias": bias,
            "ref": ref,
            "ignore_index": 0 if nll else -100,
        }
        mine = everything(ours.LigerFusedLinearDPOLoss, **options)
        assert float(mine["grad of hidden"].abs().max()) > 0
        assert (float(mine["nll"]) > 0) == nll
        assert_same(mine, everything(liger.LigerFusedLinearDPOLoss, **options), options)


def test_chunks_do_not_matter(liger: Any):
    for size in (2, 5):
        options = {"chunk_size": size, "compute_nll_loss": True}
        mine = everything(ours.LigerFusedLinearDPOLoss, **options)
        assert_same(mine, everything(liger.LigerFusedLinearDPOLoss, **options), options)


def test_16_bit_operands_keep_fp32_log_probs(liger: Any):
    x = {name: y.detach() for name, y in operands().items()}
    weight, hidden = x["weight"].bfloat16(), x["hidden"].bfloat16()
    tokens = (hidden.double() @ weight.double().T).log_softmax(-1)
    tokens = tokens.gather(-1, x["target"].clamp(min=0)[..., None])[..., 0] * (x["target"] != -100)
    expected = tokens.sum(1)[:PAIRS]

    def error(cls: Any) -> float:
        logps = cls(use_ref_model=False, compiled=False)(weight, hidden, x["target"])[1][0]
        assert logps.dtype == torch.float32
        return float((logps - expected).abs().max())

    assert error(ours.LigerFusedLinearDPOLoss) < 2e-5
    assert error(liger.LigerFusedLinearDPOLoss) > 2e-3


def test_frozen_operands_get_no_gradient():
    x = operands()
    module = ours.LigerFusedLinearDPOLoss()
    weight = x["weight"].detach()
    loss, _ = module(weight, x["hidden"], x["target"], None, x["ref_hidden"].requires_grad_(), x["ref_weight"])
    loss.backward()
    assert weight.grad is None
    assert x["ref_hidden"].grad is None
    assert x["hidden"].grad is not None
    with torch.no_grad():
        assert not module(x["weight"], x["hidden"], x["target"], None, x["ref_hidden"], weight)[0].requires_grad


def test_ipo_averages_over_tokens():
    """Liger raises for it; TRL divides each log-ratio by its completion's tokens."""
    x = operands()
    scored = x["target"] != -100

    def log_ratios() -> torch.Tensor:
        def tokens(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            logp = (hidden @ weight.T).log_softmax(-1)
            return (logp.gather(-1, x["target"].clamp(min=0)[..., None])[..., 0] * scored).sum(1)

        with torch.no_grad():
            reference = tokens(x["ref_hidden"], x["ref_weight"])
        return (tokens(x["hidden"], x["weight"]) - reference) / scored.sum(1)

    chosen, rejected = log_ratios().chunk(2)
    expected = ((chosen - rejected - 1 / (2 * 0.5)) ** 2).mean()
    gradients = torch.autograd.grad(expected, (x["hidden"], x["weight"]))
    for average in (False, True):
        loss = ours.LigerFusedLinearDPOLoss(loss_type="ipo", beta=0.5, average_log_prob=average)(
            x["weight"], x["hidden"], x["target"], None, x["ref_hidden"], x["ref_weight"]
        )[0]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, (x["hidden"], x["weight"])), gradients)


def test_label_smoothing_is_ligers(liger: Any):
    with pytest.warns(UserWarning, match=r"'sigmoid' has no label smoothing in Liger, so label_smoothing=0.2 is not"):
        mine = everything(ours.LigerFusedLinearDPOLoss, label_smoothing=0.2)
    assert_same(mine, everything(liger.LigerFusedLinearDPOLoss, label_smoothing=0.2), "sigmoid")
    for options, message in (
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing > 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "sigmoid_x"}, r"unknown loss_type 'sigmoid_x'; choose from sigmoid, hinge, ipo"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.LigerFusedLinearDPOLoss(**options)
        with pytest.raises(ValueError):  # noqa: PT011 - that Liger refuses too is the point, not its words
            liger.LigerFusedLinearDPOLoss(**options)


def test_it_is_a_module_without_state_and_attributes_count():
    module = ours.LigerFusedLinearDPOLoss(loss_type="apo_zero")
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    assert not module.state_dict()
    x = operands()
    arguments = x["weight"], x["hidden"], x["target"], None, x["ref_hidden"], x["ref_weight"]
    module.loss_type, module.beta = "sigmoid", 0.5
    assert torch.equal(module(*arguments)[0], ours.LigerFusedLinearDPOLoss(beta=0.5)(*arguments)[0])


@pytest.mark.parametrize("average", [False, True])
def test_completions_without_a_token_count_as_nothing(average: bool):
    x = operands()
    x["target"][:PAIRS] = -100
    module = ours.LigerFusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=True)
    loss, aux = module(x["weight"], x["hidden"], x["target"], x["bias"], x["ref_hidden"], x["ref_weight"])
    loss.backward()
    assert bool(loss.isfinite())
    assert bool((aux[0] == 0).all())
    assert float(aux[4]) == 0
    assert bool(x["hidden"].grad.isfinite().all())
    assert bool((x["hidden"].grad[:PAIRS] == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": None}, "use_ref_model=True needs ref_input and ref_weight; for a loss without a reference"),
        ({"ref_weight": None}, "use_ref_model=True needs ref_input and ref_weight"),
        ({"target": torch.zeros(6, 6, dtype=torch.int64)}, r"target \(2B, T\), got \(6, 7, 16\) and \(6, 6\)"),
        ({"ref_hidden": torch.zeros(6, 6, 16)}, r"ref_input must be \(6, 7\) \+ \(H,\) like _input, got \(6, 6, 16\)"),
        (
            {"hidden": torch.zeros(3, 7, 16), "target": torch.zeros(3, 7, dtype=torch.int64)},
            "chosen rows and as many rejected rows, got 3 rows",
        ),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Any], message: str):
    x = {**operands(), **change}
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearDPOLoss()(
            x["weight"], x["hidden"], x["target"], None, x["ref_hidden"], x["ref_weight"], None
        )


def test_no_liger_is_needed():
    code = (
        "import sys; sys.modules['liger_kernel'] = None\n"
        "import torch\n"
        "from fastdpo.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearCrossEntropyLoss\n"
        "hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(5, 4)\n"
        "target = torch.zeros(2, 3, dtype=torch.int64)\n"
        "loss, aux = LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target)\n"
        "ce = LigerFusedLinearCrossEntropyLoss()(weight, hidden[0], target[0])\n"
        "print(f'{loss:.4f} {len(aux)} {ce:.4f}', 'transformers' in sys.modules, 'trl' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.6931 7 1.6094 False False", done.stderr


def cross_entropy(cls: Any, bias: bool, **options: Any) -> dict[str, torch.Tensor]:
    x = operands(options.get("ignore_index", -100), DEVICE)
    arguments = x["weight"], x["hidden"].flatten(0, 1), x["target"].flatten(), x["bias"] if bias else None
    out = cls(**options)(*arguments)
    accuracy = None if isinstance(out, torch.Tensor) else out.token_accuracy
    loss = out if isinstance(out, torch.Tensor) else out.loss
    upstream = torch.arange(loss.numel(), device=DEVICE).view(loss.shape) + 1.5
    loss.backward(upstream)
    results = {"loss": loss.detach(), "grad of hidden": x["hidden"].grad, "grad of weight": x["weight"].grad}
    if bias:
        results["grad of bias"] = x["bias"].grad
    if accuracy is not None:
        assert out.z_loss is None
        assert out.predicted_tokens is None
        results["accuracy"] = accuracy.detach()
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_ligers(liger: Any, reduction: str):
    cases = [(False, {"return_token_accuracy": True, "ignore_index": 0}), (True, {"use_token_scaling": True})]
    if DEVICE == "cuda":  # Triton's interpreter stops at a float argument of these two
        cases += [(False, {"softcap": 2.0}), (True, {"ce_weight": torch.rand(VOCAB, device=DEVICE) + 0.1})]
    for bias, options in cases:
        arguments = {"reduction": reduction, "bias": bias, **options}
        mine = cross_entropy(ours.LigerFusedLinearCrossEntropyLoss, **arguments)
        assert_same(mine, cross_entropy(liger.LigerFusedLinearCrossEntropyLoss, **arguments), arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_is_torchs(reduction: str, softcap: float | None):
    x = operands()
    hidden, target, leaves = x["hidden"].flatten(0, 1), x["target"].flatten(), (x["hidden"], x["weight"], x["bias"])
    for class_weight in (None, torch.rand(VOCAB)):
        logits = hidden @ x["weight"].T + x["bias"]
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        expected = F.cross_entropy(logits, target, class_weight, reduction=reduction)
        loss = ours.LigerFusedLinearCrossEntropyLoss(class_weight, reduction=reduction, softcap=softcap)(
            x["weight"], hidden, target, x["bias"]
        )
        torch.testing.assert_close(loss, expected)
        upstream = torch.rand_like(expected) + 0.5
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves, upstream, retain_graph=True),
            torch.autograd.grad(expected, leaves, upstream, retain_graph=True),
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_of_no_target_is_zero(reduction: str):
    hidden = torch.randn(4, HIDDEN, requires_grad=True)
    for class_weight in (None, torch.rand(VOCAB)):
        loss = ours.liger_fused_linear_cross_entropy(
            hidden, torch.randn(VOCAB, HIDDEN), torch.full((4,), -100), ce_weight=class_weight, reduction=reduction
        )
        (grad,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0
        assert float(grad.abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 0.1}, NotImplementedError, "label_smoothing=0.1 needs Liger's own kernel"),
        ({"lse_square_scale": 1e-4}, NotImplementedError, "lse_square_scale=0.0001 needs"),
        ({"return_z_loss": True}, NotImplementedError, "return_z_loss=True needs"),
        ({"return_predicted_tokens": True}, NotImplementedError, "return_predicted_tokens=True needs"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
    ],
)
def test_cross_entropy_names_what_it_has_not(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ours.LigerFusedLinearCrossEntropyLoss(**options)
    with pytest.raises(error, match=message):
        ours.liger_fused_linear_cross_entropy(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([1]), **options)


def test_cross_entropy_checks_the_class_weights():
    with pytest.raises(ValueError, match=r"ce_weight must be \(5,\), got \(4,\)"):
        ours.liger_fused_linear_cross_entropy(
            torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([1]), ce_weight=torch.ones(4)
        )
