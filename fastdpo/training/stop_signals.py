"""SIGTERM and SIGHUP, by which a cluster or a closing terminal ends a run: first a checkpoint, then the end."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainingArguments

logger = logging.getLogger(__name__)

EXIT_CODE = 143


class Preempted(SystemExit):
    """The process was asked to end, and a checkpoint is written; exit code 143, as a SIGTERM has it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class EvaluationLeft(Exception):
    """Left an evaluation in the middle, since the process was asked to end."""


class StopSignals(TrainerCallback):
    """Catches the signals while a trainer trains.

    Attributes:
        received: the signal's name, of this process.
        stopping: the trainer saves at the end of this step, and then ends.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopping = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them meanwhile, where nobody else does: one that is ignored (nohup) or handled already stays so.

        A second signal ends the process at once.
        """
        self.received, self.stopping = None, False
        # Python sets handlers in its main thread only
        main = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if main and hasattr(signal, name)]
        mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        for number in mine:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, signal.SIG_DFL)
            self.received = None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number).name
        logger.warning(f"{self.received}: a checkpoint is written at the end of this step; a second one ends at once.")

    def stop(self, control: TrainerControl) -> None:
        """Make the trainer save now and train no further."""
        self.stopping = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_prediction_step(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        # several processes would have to leave at the same batch; they finish the evaluation
        if self.received is not None and args.world_size == 1:
            raise EvaluationLeft
