"""What a comparison gives the measurement: one step of an entry, what is right, and the work that it is."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastdpo.ops.oracle import Outputs, Truth

from .bounds import Work
from .entries import Entry


class AnyCase(Protocol):
    """A dataclass with the shape of one case."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def mode(self) -> str: ...

    @property
    def head(self) -> str: ...


class Comparison(ABC):
    """Inputs of one shape and dtype, for all modes."""

    softcap: float | None = None

    @property
    @abstractmethod
    def operands(self) -> tuple[Tensor, Tensor]:
        """hidden (N, H) and weight (V, H), whose product's rate is the ceiling."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Scored tokens, N."""

    @abstractmethod
    def grown(self, size: int) -> "Comparison":
        """The same inputs, repeated or cut to `size` units (`Growth`)."""

    @abstractmethod
    def sample(self, outputs: Outputs) -> tuple["Comparison", Outputs]:
        """A small comparison of a few of these inputs, and what of `outputs` it can check."""

    @abstractmethod
    def step(self, entry: Entry, mode: str) -> Outputs:
        """One forward (and backward) of an entry."""

    @abstractmethod
    def eager_outputs(self) -> Outputs:
        """Of plain eager PyTorch, all gradients included, in pieces: all its logits at once may not fit."""

    @abstractmethod
    def work(self, entry: Entry, mode: str) -> tuple[Work | None, float | None]:
        """What the entry has to do, and (ours) the peak MiB that its plan predicts."""

    @abstractmethod
    def make_truth(self) -> Truth: ...

    @staticmethod
    def gradients(**leaves: Tensor) -> Outputs:
        """Of the leaves that are to have one, by name.

        Raises:
            RuntimeError: one has none: an entry that leaves out the work would be the fastest.
        """
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
        if absent := [name for name, grad in gradients.items() if grad is None]:
            raise RuntimeError(f"it gives no {' and no '.join(absent)}")
        return {name: grad for name, grad in gradients.items() if grad is not None}

    @cached_property
    def truth(self) -> Truth:
        return self.make_truth()

    @cached_property
    def eager_errors(self) -> dict[str, float]:
        """The measure of others' errors."""
        return self.truth.errors(self.eager_outputs())
