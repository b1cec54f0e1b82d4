"""What only a GPU can show of the operators: replays of a captured graph, and a device that is not current."""

import pytest
import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.api import linear_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on(device: str, args: list[Tensor]) -> list[Tensor]:
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in args]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
class TestOnAGpu:
    def test_forward_and_backward_replay_from_a_graph(self, trained, keep, monkeypatch, operands, equal):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        first, second = (
            on("cuda", [*operands((1, trained, 0), torch.bfloat16, n=300)[:2], x])
            for x in (operands(ignored=True, n=300)[-1], operands(n=300)[-1])
        )

        def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
            out = linear_logprob(hidden, weight, labels)
            leaves = [x for x in (hidden, weight) if x.requires_grad]
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, 300, device="cuda"))]

        expected = [[x.clone() for x in step(*args)] for args in (first, second)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*first)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*first)
        for args, results in ((first, expected[0]), (second, expected[1])):
            with torch.no_grad():
                for static, fresh in zip(first, args, strict=True):
                    static.copy_(fresh)
            graph.replay()
            assert equal(captured, results)
        assert not equal(expected[0], expected[1])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_a_device_that_is_not_current(self, trained, keep, monkeypatch, operands, results_of, equal):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        args, by_device = operands((1, trained, 0), ignored=True), []
        for device in ("cuda:0", "cuda:1"):
            hidden, weight, _, labels = on(device, args)
            with torch.cuda.device(0):
                results = results_of(linear_logprob, (hidden, weight, labels))
            by_device.append([x.cpu() if isinstance(x, Tensor) else x for x in results])
        assert equal(*by_device)
