"""Arguments that are no plain tensors: one sentence each with the fix, and shapes for those that have no values."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fastdpo import DPOLoss, FusedLinearDPOLoss, linear_logprob, linear_logprob_stats, logprob, segment_sum
from fastdpo import sequence_logprob as sequence
from fastdpo.ops.linear_logprob.api import linear_logprob_plan as plan

N, H, V = 6, 4, 9
HIDDEN, WEIGHT, LABELS = torch.randn(N, H), torch.randn(V, H), torch.arange(N)
ENTRANCES = {"linear_logprob": linear_logprob, "stats": linear_logprob_stats, "plan": plan}


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_BACKEND", "tiled")


def learned(value: float = 0.7) -> Tensor:
    return torch.tensor(value, requires_grad=True)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "numpy": (
        {"hidden": HIDDEN.numpy()},
        r"hidden must be a tensor, got numpy.ndarray; make one with torch.from_numpy",
    ),
    "list": ({"labels": LABELS.tolist()}, "labels must be a tensor, got list; make one with torch.tensor"),
    "rows": ({"rows": [0, 1]}, "rows must be a tensor, got list; make one with torch.tensor"),
    "module": ({"weight": nn.Linear(H, V, bias=False)}, r"weight .*got the module Linear; pass .*\(lm_head.weight\)"),
    "biased": ({"weight": nn.Linear(H, V)}, "got the module Linear; pass lm_head.weight, and bias=lm_head.bias"),
    "sparse": ({"weight": WEIGHT.to_sparse()}, r"weight is a sparse_coo tensor.*; pass weight.to_dense\(\)"),
    "bias": ({"bias": torch.zeros(V).to_sparse()}, r"bias is a sparse_coo tensor.*; pass bias.to_dense\(\)"),
    "lora": ({"lora": (torch.zeros(N, 2).numpy(), torch.zeros(V, 2))}, r"lora: s \* A h must be a tensor, got numpy"),
    "swapped": ({"hidden": WEIGHT, "weight": HIDDEN}, r"labels .* got \(6,\); hidden and weight look swapped: pass"),
    "transposed": ({"weight": WEIGHT.t()}, r"weight must be \(V, 4\) .* got \(4, 9\); pass weight.t\(\)"),
    "shift": ({"rows": LABELS, "shift": True}, "shift=True and rows exclude each other;.*: leave shift out"),
    "scale": ({"logit_scale": learned()}, r"logit_scale is a tensor that requires grad.*no gradient; pass .*multiply"),
    "temperature": ({"temperature": learned()}, r"requires grad.*; pass temperature.item\(\), or .*divide hidden"),
    "softcap": ({"softcap": learned(3.0)}, r"requires grad.*; pass softcap.item\(\), or .*fastdpo.ops.reference"),
    "elsewhere": ({"logit_scale": torch.ones((), device="meta")}, r"must be a number, got .*meta; pass a Python float"),
    "vector": ({"softcap": torch.ones(2)}, r"softcap must be a number, got a tensor of shape \(2,\) on cpu; pass a Py"),
    "text": ({"temperature": "1"}, "temperature must be a number, got '1'; pass a Python float"),
    "none": ({"temperature": None}, "temperature must be a number, got None; pass a Python float"),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("case", BAD)
def test_one_sentence_with_the_fix(case, entrance):
    change, words = BAD[case]
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **change}
    with pytest.raises((TypeError, ValueError), match=f"^linear_logprob.*{words}") as refused:
        ENTRANCES[entrance](**arguments)
    assert "\n" not in str(refused.value)


def test_the_other_entrances_say_it_too():
    states, labels = HIDDEN[:4].view(2, 2, H), LABELS[:4].view(2, 2)
    fused = FusedLinearDPOLoss(loss_type="simpo")
    nested = torch.nested.nested_tensor([HIDDEN, HIDDEN[:2]], layout=torch.jagged)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: sequence(states.numpy(), WEIGHT, labels), "^sequence_logprob: hidden .* numpy.ndarray"),
        (lambda: sequence(states, nn.Linear(H, V), labels), "^sequence_logprob: weight .* pass lm_head.weight"),
        (lambda: sequence(states, WEIGHT, labels, rows=LABELS, shift=True), "rows has no sequences; use"),
        (lambda: logprob(HIDDEN.numpy(), LABELS), "^logprob: logits must be a tensor, got numpy.ndarray"),
        (lambda: logprob(HIDDEN.to_sparse(), LABELS), r"^logprob: .*pass logits.to_dense\(\)"),
        (lambda: logprob(HIDDEN, LABELS % H, temperature=learned()), "^logprob: temperature .*divide .*the logits"),
        (lambda: linear_logprob(nested, WEIGHT, LABELS), r"hidden is a nested tensor.*pass torch.cat\(hidden.unbind"),
        (lambda: segment_sum([1.0], LABELS), "^segment_sum: values must be a tensor, got list"),
        (lambda: fused(nn.Linear(H, V), states, labels), "^FusedLinearDPOLoss: weight .* pass lm_head.weight"),
        (lambda: fused(WEIGHT, states, labels.numpy()), "^FusedLinearDPOLoss: labels .* torch.from_numpy"),
        (lambda: fused(states, WEIGHT, labels), "hidden must be .*; weight comes first, then hidden"),
        (lambda: DPOLoss("simpo")([1.0, 2.0]), "^DPOLoss: policy_logps must be a tensor, got list"),
    ]
    for call, words in calls:
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_constants_may_be_tensors_that_learn_nothing():
    for name in ("logit_scale", "temperature", "softcap"):
        by_float = linear_logprob(HIDDEN, WEIGHT, LABELS, **{name: 0.5})
        for value in (torch.tensor(0.5), np.float32(0.5), torch.tensor([0.5])):
            assert torch.equal(linear_logprob(HIDDEN, WEIGHT, LABELS, **{name: value}), by_float)
        with torch.no_grad():  # no gradient is lost here
            assert torch.equal(linear_logprob(HIDDEN, WEIGHT, LABELS, **{name: learned(0.5)}), by_float)


def test_a_sharded_weight(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(WEIGHT, init_device_mesh("cpu", (1,)), [Shard(0)]))
        for arguments, name in (((HIDDEN, sharded), "weight"), ((sharded[:N].detach(), WEIGHT), "hidden")):
            with pytest.raises(TypeError, match=rf"{name} is a DTensor.*; pass {name}.full_tensor\(\)"):
                linear_logprob(*arguments, LABELS)
        linear_logprob(HIDDEN, sharded.full_tensor(), LABELS).sum().backward()
        assert isinstance(sharded.grad, DTensor)
        own = WEIGHT.clone().requires_grad_()
        linear_logprob(HIDDEN, own, LABELS).sum().backward()
        assert torch.equal(sharded.grad.full_tensor(), own.grad)
    finally:
        dist.destroy_process_group()


def step(make: Callable[..., Tensor], trained: bool) -> list[Any]:
    """(shape, dtype, device) of every result and gradient of one step over all public functions."""
    hidden = make(2, 3, H).requires_grad_()
    weight, u, b = make(V, H).requires_grad_(trained), make(2, 3, 2).requires_grad_(), make(V, 2)
    labels = make(2, 3).long()
    rows = make(5).long()
    stats = linear_logprob_stats(hidden, weight, labels, lora=(u, b), stats=("entropy", "is_top1"), shift=True)
    outputs = [stats.logprob, stats.entropy, linear_logprob(hidden, weight, rows, rows=rows)]
    outputs += [sequence(hidden, weight, labels), logprob(hidden @ weight.t(), labels, temperature=2.0)]
    outputs.append(FusedLinearDPOLoss()(weight, hidden, labels, ref_hidden=make(2, 3, H))[0])
    torch.stack([x.sum() for x in outputs]).sum().backward()
    grads = [x.grad for x in (hidden, u, *((weight,) if trained else ()))]
    assert all(x is not None for x in grads)
    return [(x.shape, x.dtype, x.device.type) for x in (*outputs, stats.is_top1, *grads)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_fake_and_meta_tensors_take_a_step(backend, trained, monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    real = step(torch.zeros, trained)
    with FakeTensorMode():
        assert step(torch.zeros, trained) == real
        hidden, weight, labels = torch.zeros(N, H).requires_grad_(), torch.zeros(V, H), torch.zeros(N).long()
        fake_plan = plan(hidden, weight, labels)
    on_meta = step(lambda *shape: torch.zeros(*shape, device="meta"), trained)
    assert on_meta == [(shape, dtype, "meta") for shape, dtype, _ in real]
    assert fake_plan == plan(HIDDEN.clone().requires_grad_(), WEIGHT, LABELS)
    assert plan(HIDDEN.to("meta"), WEIGHT.to("meta"), LABELS.to("meta")).flops == plan(HIDDEN, WEIGHT, LABELS).flops


def test_a_fake_gpu_is_planned_without_one():
    with FakeTensorMode():
        hidden, weight, labels = (torch.zeros(*size, device="cuda") for size in ((N, H), (V, H), (N,)))
        assert linear_logprob(hidden, weight, labels.long()).device.type == "cuda"


def transforms(op: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    def forward_mode() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(op(forward_ad.make_dual(x, x))).tangent

    return {
        "grad": lambda: torch.func.grad(lambda a: op(a).sum())(x),
        "vjp": lambda: torch.func.vjp(op, x)[1](op(x).detach() * 0 + 1)[0],
        "jvp": lambda: torch.func.jvp(op, (x,), (x,))[1],
        "vmap": lambda: torch.func.vmap(op)(torch.stack((x, 2 * x))),
        "forward mode": forward_mode,
    }


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear_logprob": lambda x: linear_logprob(x, WEIGHT, LABELS),
    "logprob": lambda x: logprob(x @ WEIGHT.t(), LABELS),
    "sequence": lambda x: sequence(x.view(2, 3, H), WEIGHT, LABELS.view(2, 3)),
}


@pytest.mark.parametrize("name", OPS)
def test_transforms_are_refused_or_right(name, tiled, monkeypatch):
    x = HIDDEN.clone()
    for transform, apply in transforms(OPS[name], x).items():
        said = "logprob" if name == "logprob" else "linear_logprob"
        with pytest.raises(
            RuntimeError, match=f"^{said} does not run under torch.func.*FASTDPO_BACKEND=reference"
        ) as e:
            apply()
        assert "\n" not in str(e.value), transform
    leaf = x.clone().requires_grad_()
    OPS[name](leaf).sum().backward()
    doubled = OPS[name](2 * x)
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    by_transform = {transform: apply() for transform, apply in transforms(OPS[name], x).items()}
    assert leaf.grad is not None
    for transform in ("grad", "vjp"):
        assert torch.allclose(by_transform[transform], leaf.grad, atol=1e-5)
    assert torch.allclose(by_transform["vmap"][1], doubled, atol=1e-5)
    for transform in ("jvp", "forward mode"):
        assert torch.allclose(by_transform[transform].sum(), (leaf.grad * x).sum(), atol=1e-4)


def test_sums_go_through_transforms():
    offsets, values = torch.tensor([0, 0, 4, 6]), HIDDEN[:, 0]
    assert torch.allclose(
        torch.func.vmap(lambda x: segment_sum(x, offsets))(values[None])[0], segment_sum(values, offsets)
    )
    assert torch.equal(torch.func.grad(lambda x: segment_sum(x, offsets)[1])(values), (torch.arange(6) < 4).float())
