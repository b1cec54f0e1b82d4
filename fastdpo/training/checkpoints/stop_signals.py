"""SIGTERM and SIGHUP, by which a cluster or a closing terminal ends a run: first a checkpoint, then the end."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainingArguments

logger = logging.getLogger(__name__)

EXIT_CODE = 143
# schedulers and shells send a signal several times, to the process and by its parents
AGAIN_AFTER = 10.0


class Preempted(SystemExit):
    """The process was asked to end, and a checkpoint is written; exit code 143, as a SIGTERM has it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class EvaluationLeft(Exception):
    """Left an evaluation in the middle, since the process was asked to end."""


class LeftToTheTrainer:
    """A data loader's `worker_init_fn`: a signal to the whole group is for the trainer, which needs its workers.

    Where it does not train, they end as workers do: Python ends those that are left at its exit by SIGTERM, and waits.

    init: the loader's own. training: whether the trainer trains, in shared memory.
    """

    def __init__(self, init: Callable[[int], None] | None, training: Any) -> None:
        self.init, self.training = init, training

    def __call__(self, worker: int) -> None:
        for number in _numbers():
            signal.signal(number, self._receive)
        if self.init is not None:
            self.init(worker)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.training.value:
            os._exit(0)  # as torch's own handler in workers


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignals(TrainerCallback):
    """Catches the signals while a trainer trains.

    Attributes:
        received: the signal's name, of this process.
        stopping: the trainer saves at the end of this step, and then ends.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopping = False
        # without a lock, which a handler could find taken
        self._training = multiprocessing.RawValue("b", 0)

    def spare(self, loader: DataLoader) -> DataLoader:
        """The loader, whose workers leave signals to the trainer while it trains."""
        if not isinstance(loader.worker_init_fn, LeftToTheTrainer):  # else Trainer kept the loader of persistent ones
            loader.worker_init_fn = LeftToTheTrainer(loader.worker_init_fn, self._training)
        return loader

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them meanwhile, where nobody else does: one that is ignored (nohup) or handled already stays so.

        A second signal, some seconds later, ends the process at once.
        """
        self.received, self.stopping = None, False
        # Python sets handlers in its main thread only
        main = threading.current_thread() is threading.main_thread()
        mine = [number for number in _numbers() if main and signal.getsignal(number) is signal.SIG_DFL]
        for number in mine:
            signal.signal(number, self._receive)
        self._training.value = 1
        try:
            yield
        finally:
            self._training.value = 0
            for number in mine:
                signal.signal(number, signal.SIG_DFL)
            self.received = None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if time.monotonic() - self._since > AGAIN_AFTER:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._since = signal.Signals(number).name, time.monotonic()
        logger.warning(
            f"{self.received}: a checkpoint is written at the end of this step; one more, after {AGAIN_AFTER:.0f} s, "
            "ends at once."
        )

    def stop(self, control: TrainerControl) -> None:
        """Make the trainer save now and train no further."""
        self.stopping = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_prediction_step(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        # several processes would have to leave at the same batch; they finish the evaluation
        if self.received is not None and args.world_size == 1:
            raise EvaluationLeft
