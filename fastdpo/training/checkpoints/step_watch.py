"""After every update: is everything finite, and has the process been asked to end?

The answer is made on the device, of several processes together, and copied to the host without waiting; it is read when
the next step ends, so that the host never waits for the step that it has just launched. Before anything is logged,
evaluated or saved it is waited for: no checkpoint holds weights that are not finite. On a CPU it is there at once.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.training.checkpoints.stop_signals import StopSignals

logger = logging.getLogger(__name__)

Largest = tuple[list[str], Tensor]  # parameters' names, and a number of each, (P,)


class NotFiniteError(FloatingPointError):
    """Training met a loss, a gradient or a weight that is NaN or infinite; the message is one sentence."""


class StepWatch(TrainerCallback):
    """Stops a run whose numbers are not finite any more, and one that was asked to end.

    The trainer hands over each loss and says when the gradients of an update are complete, before they are clipped:
    clipping spreads one NaN over all of them.

    on_nan: "stop" raises `NotFiniteError`, "continue" says it once. scaled: gradients are under a loss scale (fp16),
    where infinite ones are routine and their step is skipped. advice: what the error says after the cause.
    """

    def __init__(self, on_nan: str, scaled: bool, signals: StopSignals, advice: Callable[[], str]) -> None:
        self.on_nan, self.scaled, self.signals, self.advice = on_nan, scaled, signals, advice
        self._start()

    def _start(self) -> None:
        self._looking = True
        self._loss: Tensor | None = None
        self._gradients: Largest | None = None
        self._pending: deque[_Step] = deque()

    def add_loss(self, loss: Tensor) -> None:
        """One micro-batch's loss, a scalar."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def look_at_gradients(self, model: nn.Module) -> None:
        """Once for each update, before gradients are clipped."""
        if self._looking and not self.scaled:
            self._gradients = _largest((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = None
        if self._looking:
            weights = _largest((name, p) for name, p in kwargs["model"].named_parameters() if p.requires_grad)
        self._pending.append(_Step.of(state.global_step, self._loss, self._gradients, weights, self.signals, args))
        self._loss = self._gradients = None
        waits = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if self._read(0 if waits else steps_behind(args.device)):
            self.signals.stop(control)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        # a signal that is read here comes again at the next step, if there is one
        self.settle()

    def settle(self) -> bool:
        """Wait for all steps so far; True where the process was asked to end. Raises `NotFiniteError`."""
        return self._read(0)

    def _read(self, left: int) -> bool:
        """Look at all steps but the last `left`; True where the process was asked to end."""
        stop = False
        while len(self._pending) > left:
            step = self._pending.popleft()
            bad, asked = step.read()
            stop |= asked
            if not bad or not self._looking:
                continue
            where = f"step {step.number}: {step.cause()}"
            if self.on_nan == "stop":
                self._pending.clear()
                raise NotFiniteError(f"{where}, so training stops; {self.advice()}")
            self._looking = False
            logger.warning(f"{where}, and training goes on (on_nan is 'continue').")
        return stop


def steps_behind(device: torch.device) -> int:
    """How many steps may be under way while the host goes on."""
    return 0 if device.type == "cpu" else 1


@dataclass
class _Step:
    """One update: its losses' sum (), the largest values of gradients and weights, and two flags on their way."""

    number: int
    loss: Tensor | None
    gradients: Largest | None
    weights: Largest | None
    flags: Tensor  # (2,) int32 on the CPU: not finite, asked to end
    copied: torch.Event | None

    @classmethod
    def of(
        cls,
        number: int,
        loss: Tensor | None,
        gradients: Largest | None,
        weights: Largest | None,
        signals: StopSignals,
        args: TrainingArguments,
    ) -> "_Step":
        device = args.device
        parts = [part[1].to(device) for part in (gradients, weights) if part is not None]
        parts += [loss.reshape(1).to(device)] if loss is not None else []
        flags = torch.full((2,), int(signals.received is not None), dtype=torch.int32, device=device)
        flags[0] = (~torch.isfinite(torch.cat(parts))).any() if parts else 0
        if args.world_size > 1:
            # all processes stop at the same step, or none
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        if device.type == "cpu":
            return cls(number, loss, gradients, weights, flags, None)
        host = torch.empty((2,), dtype=torch.int32, pin_memory=flags.is_cuda).copy_(flags, non_blocking=True)
        copied = torch.Event(device)
        copied.record()
        return cls(number, loss, gradients, weights, host, copied)

    def read(self) -> tuple[bool, bool]:
        if self.copied is not None:
            self.copied.synchronize()
        bad, asked = self.flags.numpy()
        return bool(bad), bool(asked)

    def cause(self) -> str:
        """Where it began: the loss before a gradient, a gradient before a weight."""
        if self.loss is not None and not torch.isfinite(self.loss):
            return f"the loss is {self.loss.item():g}"
        for what, values in (("the gradient of", self.gradients), ("the weight", self.weights)):
            if values is not None:
                names, largest = values
                wrong = (~torch.isfinite(largest)).nonzero().flatten().tolist()
                if wrong:
                    more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                    return f"{what} {names[wrong[0]]}{more} is {largest[wrong[0]].item():g}"
        return "a loss, gradient or weight of another process is not finite"


@torch.no_grad()
def _largest(tensors: Iterable[tuple[str, Tensor]]) -> Largest | None:
    """Names, and the largest absolute value of each tensor, NaN where one of its values is (fp32, (P,))."""
    # of a tensor that is split, what this process holds
    local = [(name, tensor.to_local() if isinstance(tensor, DTensor) else tensor) for name, tensor in tensors]
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, tensor in local:
        if tensor.numel() and tensor.is_floating_point():
            alike.setdefault((tensor.device, tensor.dtype), []).append((name, tensor))
    names: list[str] = []
    values: list[Tensor] = []
    for some in alike.values():
        # in one launch where the device can; PyTorch's own gradient clipping calls it too
        norms = torch._foreach_norm([tensor for _, tensor in some], float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        values.append(torch.stack(list(norms)).float().to(local[0][1].device))
        names += [name for name, _ in some]
    return (names, torch.cat(values)) if values else None
