"""A Trainer's own `train()`, stopped between steps: what several trainers need to run interleaved in one process.

The loop is the trainer's, with its data loader, collator, callbacks, clipping, optimizer, scheduler and logging. It
runs in a thread of its own, which waits where a step begins until it is given a turn of so many steps; no two threads
run at a time.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback

During = Callable[[], AbstractContextManager[Any]]


class _Ended(BaseException):
    """Leaves `train()` for good; nothing in it catches this."""


class StepByStep(TrainerCallback):
    """Gives a trainer turns of steps.

    A turn goes from where its first step begins to where the step after its last one would: the steps, what is logged
    after them, and the collating of the next batch.

    Attributes:
        logs: what the trainer logged of each step, while `log_every_step` is set; otherwise it logs as its arguments
            say, and nothing is kept.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.logs: list[dict[str, float]] = []
        self.log_every_step = True
        self._steps = 0
        self._during: During = nullcontext
        self._around = ExitStack()
        self._ending = False
        self._failure: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)

    def start(self) -> None:
        """Everything before the first step: optimizer, data loader, the first batch."""
        self._thread.start()
        self._wait()

    def take(self, steps: int, during: During = nullcontext) -> None:
        """`steps` steps; each of them runs inside a context that `during` makes, in the trainer's thread.

        Raises:
            what the trainer raises; it is at its end then.
        """
        self._steps, self._during = steps, during
        self._go.release()
        self._wait()

    def end(self) -> None:
        """Leaves `train()`, at the next step where one is under way."""
        self._ending = True
        self._go.release()
        if self._thread.is_alive():
            self._thread.join()

    def _wait(self) -> None:
        self._stopped.acquire()
        if self._failure is not None:
            raise self._failure

    def _train(self) -> None:
        try:
            self.trainer.train()
            raise RuntimeError("the training is over: max_steps is less than the turns that were asked for")
        except _Ended:
            pass
        except BaseException as failure:
            self._failure = failure
        finally:
            self._around.close()
            self._stopped.release()

    # in the trainer's thread

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self._steps:
            self._stopped.release()
            self._go.acquire()
        if self._ending:
            raise _Ended
        self._around.enter_context(self._during())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._around.close()
        self._steps -= 1
        control.should_log = control.should_log or self.log_every_step
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.log_every_step and logs and "loss" in logs:
            self.logs.append(dict(logs))
