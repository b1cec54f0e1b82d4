"""A Trainer that saves and restores the adapter that is trained, whatever its name and beside whatever others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from fastdpo.models.adapters import saved_at_root, trained_adapter, trained_beside
from fastdpo.training.checkpoints.trainer import SafeCheckpointTrainer


class AdapterTrainer(SafeCheckpointTrainer):
    """The final model is the trained adapter, at the root of its folder; checkpoints keep PEFT's sub-folders.

    Trainer restores an adapter at the root of a checkpoint under the name "default", whatever the trained one is
    called, and looks for the best model only there.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._adapter_at_root():
            super()._save(output_dir, state_dict)

    @contextmanager
    def _adapter_at_root(self) -> Iterator[None]:
        model = self.model
        if self._staging is None and isinstance(model, PeftModel) and list(model.peft_config) != ["default"]:
            with saved_at_root(model):
                yield
        else:
            yield

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Raises:
            ValueError: nothing is trainable, or something is that belongs to no adapter and so would not be saved.
        """
        model = self.model
        if isinstance(model, nn.Module) and not any(p.requires_grad for p in model.parameters()):
            what = f"of the adapter {trained_adapter(model)!r} " if isinstance(model, PeftModel) else ""
            raise ValueError(
                f"no weight {what}is trainable; load an adapter with is_trainable=True, or name it in "
                "model_adapter_name."
            )
        beside = trained_beside(model) if isinstance(model, PeftModel) else []
        if beside and not self._sharded:
            more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
            raise ValueError(
                f"{beside[0]}{more} would be trained and belongs to no adapter, so that neither a checkpoint nor the "
                "final adapter would hold it; name its module in the adapter's modules_to_save, or freeze it."
            )
        return super().train(*args, **kwargs)
