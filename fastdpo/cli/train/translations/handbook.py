"""A recipe of the alignment-handbook as arguments of `fastdpo train`. Its other keys are TRL's, which are ours.

A weight in a recipe is the share of a dataset's own rows (`rate`), where our `fraction` is a share of the mixture.
Which loss is trained is a recipe's script, not its key: one of ORPO needs `loss_type=orpo` beside it.
"""

from collections.abc import Mapping
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.tool import Arguments, Tool, flag, nothing, only, typed, value_of
from fastdpo.cli.train.values import Argument

RENAMED = {
    "base_model_revision": "model_revision",
    "hub_model_revision": "hub_revision",
    "preprocessing_num_workers": "dataset_num_proc",
    "torch_dtype": "dtype",
}
REFUSED = {
    "decontaminate": "take such rows out of the file",
    "text_column": "rows of preferences have prompt, chosen and rejected",
}
NO_EFFECT = {
    "the model's folder says it": "model_code_revision tokenizer_name_or_path use_fast_tokenizer",
    "the run's seed draws": "mixture_seed",
    "tokens are cut by max_length and truncation_mode": "truncation_side",
    "nothing is run after training": "benchmarks callbacks eval_on_each_dataset",
    "the tracker reads its environment variables": "wandb_entity wandb_project wandb_run_group",
    "nothing is cached": "dataset_kwargs",
}


def _is_one(arguments: Arguments) -> bool:
    """Its mixture is a mapping; the name alone is a mistake of somebody who comes from there."""
    return any(isinstance(value_of(arguments, name), Mapping) for name in ("dataset_mixer", "dataset_mixture"))


def _flash_attention(argument: Argument) -> dict[str, Any]:
    return flag({"attn_implementation": "flash_attention_2"})(argument)


def _settle(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    if "dataset_name" in ours and not ours["dataset_name"].place:  # the command line goes first
        return
    if "dataset_mixture" in theirs:
        _settle_mixture(theirs["dataset_mixture"], ours, unused)
    if "dataset_mixer" in theirs:
        _settle_mixer(theirs, ours)


def _settle_mixture(argument: Argument, ours: Arguments, unused: dict[str, str]) -> None:
    mixture = typed(argument, "dict")
    unknown = next((key for key in mixture if key not in ("datasets", "seed", "test_split_size")), None)
    entries = mixture.get("datasets")
    if unknown is not None or not isinstance(entries, list) or not all(isinstance(item, Mapping) for item in entries):
        raise UsageError(f"{argument.where} should have datasets (a list, each with id and weight) and test_split_size")
    specs = [_spec(entry, f"{argument.where}.datasets[{index}]") for index, entry in enumerate(entries)]
    ours["datasets"] = Argument("datasets", specs, argument.place)
    if mixture.get("seed") is not None:
        unused["dataset_mixture.seed"] = "the run's seed draws"
    size = mixture.get("test_split_size")
    if size is not None and "test_split_size" not in ours:
        ours["test_split_size"] = Argument("test_split_size", size, argument.place)


def _spec(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {"id": "path", "config": "name", "split": "split", "columns": "columns", "weight": "rate"}
    unknown = next((key for key in entry if key not in names), None)
    if unknown is not None:
        raise UsageError(f"{where}: there is no key '{unknown}'; wanted {', '.join(names)}")
    spec = {names[key]: value for key, value in entry.items() if value is not None}
    if spec.get("rate") == 1:
        del spec["rate"]
    return spec


def _settle_mixer(theirs: Arguments, ours: Arguments) -> None:
    """`dataset_mixer`: each dataset's share; `dataset_splits`: those with `test` in their names are evaluated on."""
    argument = theirs["dataset_mixer"]
    mixer = typed(argument, "dict")
    splits = value_of(theirs, "dataset_splits", ["train", "test"])
    configs = value_of(theirs, "dataset_configs", [None] * len(mixer))
    texts = isinstance(splits, list) and all(isinstance(split, str) for split in splits)
    if not texts or not isinstance(configs, list) or len(configs) != len(mixer):
        raise UsageError(f"{argument.where}: dataset_splits and dataset_configs should be lists, one config for each")
    tests = [split for split in splits if "test" in split]
    specs = [
        {
            "path": path,
            "split": split,
            **({"name": config} if config else {}),
            **({"rate": share} if share != 1 else {}),
        }
        for (path, share), config in zip(mixer.items(), configs, strict=True)
        for split in splits
        if split not in tests
    ]
    ours["datasets"] = Argument("datasets", specs, argument.place)
    evaluated = value_of(ours, "eval_strategy", "no") != "no" or value_of(ours, "do_eval", False)
    if not tests or not evaluated or {"eval_dataset_name", "test_split_size"} & ours.keys():
        return
    if len(tests) > 1:
        raise UsageError(f"{theirs['dataset_splits'].where} has several splits to evaluate on: keep one")
    ours["eval_dataset_name"] = Argument("eval_dataset_name", ",".join(mixer), argument.place)
    ours["dataset_test_split"] = Argument("dataset_test_split", tests[0], argument.place)


HANDBOOK = Tool(
    name="alignment-handbook",
    mark="dataset_mixture",
    is_one=_is_one,
    renamed=RENAMED,
    refused=REFUSED,
    no_effect=NO_EFFECT,
    by_code={
        "auto_insert_empty_system_msg": only(False, fix="put the system message into the rows (`system`)"),
        "dataset_configs": nothing,
        "dataset_mixer": nothing,
        "dataset_mixture": nothing,
        "dataset_splits": nothing,
        "use_flash_attention_2": _flash_attention,
    },
    settle=_settle,
)
