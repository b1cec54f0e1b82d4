"""What a run's summary says of the run beside its metrics: model, data, batches, reference, advice."""

from typing import Any

from peft import LoraConfig, PeftModel

from fastdpo.models.adapters import trained_adapter
from fastdpo.training.report.model_card import hub_names

# LoraConfig's names under those of the command line
_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def run_details(trainer: Any) -> dict[str, Any]:
    """As far as a `DPOTrainer` knows it; who made model and data may know more.

    model: "name_or_path" (None of a model without a name), "trained_as" (lora, full), the adapter's settings. data:
    "name" (None where it is not from the hub), "pairs" that are trained on and evaluated, counts of the tokenization.
    The lists of advice are the trainer's own: they grow while it trains.
    """
    evals = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    sizes = {name: len(data) for name, data in {"train": trainer.train_dataset, **evals}.items() if _is_sized(data)}
    return {
        "model": model_details(trainer.model),
        "data": {
            "name": ", ".join(hub_names(trainer.train_dataset)) or None,
            "pairs": sizes,
            "tokenized": {name: report.as_dict() for name, report in trainer.tokenize_reports.items()},
        },
        "batches": trainer.layout_description,
        "reference": {**trainer.reference_origin, "description": trainer.reference_description},
        "advice": trainer.advisor.given,
    }


def model_details(model: Any) -> dict[str, Any]:
    """A model that is not wrapped for training yet."""
    if not isinstance(model, PeftModel):
        return {"name_or_path": model.name_or_path or None, "trained_as": "full"}
    config = model.peft_config[trained_adapter(model)]
    base = config.base_model_name_or_path or model.get_base_model().name_or_path
    details: dict[str, Any] = {"name_or_path": base or None, "trained_as": "lora"}
    if isinstance(config, LoraConfig):
        details |= {name: getattr(config, own) for name, own in _LORA.items()}
        if isinstance(details["lora_target_modules"], set):  # in an order of its own in each process
            details["lora_target_modules"] = sorted(details["lora_target_modules"])
    return details


def _is_sized(data: Any) -> bool:
    return hasattr(data, "__len__")
