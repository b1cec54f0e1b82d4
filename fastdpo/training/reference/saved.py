"""The reference's file in a checkpoint: there only where it cannot be made again from the run's arguments."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdpo.training.checkpoints.folders import REFERENCE_NAME, CheckpointError
from fastdpo.training.reference.base import Reference, ReferenceState


class ReferenceFile:
    """A `FilePart` of checkpoints: the tensors of a reference's `state_dict`, no file where that is empty."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.reference.state_dict().values())

    def save(self, folder: Path) -> None:
        state = self.reference.state_dict()
        if state:
            # a model's parameters may be views of one another
            tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / REFERENCE_NAME, metadata={"kind": state.kind})

    def load(self, folder: Path) -> None:
        """Raises CheckpointError: the checkpoint has a reference and this run needs none, or the other way round, or
        it is of another kind."""
        path, needed = folder / REFERENCE_NAME, bool(self.reference.state_dict())
        if path.is_file() != needed:
            has, needs = ("a", "none") if path.is_file() else ("no", "one")
            raise CheckpointError(
                f"cannot resume from {folder}: it has {has} reference of its own (sync_ref_model, or an adapter that "
                f"is trained further) and this run needs {needs}; go on with the arguments that the run began with."
            )
        state = ReferenceState({}, "none")
        if needed:
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("kind", "of an unknown kind")
            state = ReferenceState(load_file(path), kind)
        try:
            self.reference.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}.") from error
