"""The pairs of a run, from the data arguments: what is trained on, and what is evaluated on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.fields import FIELDS
from fastdpo.wording import one_sentence

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from fastdpo.config.dpo_config import DPOConfig

TEST_SPLIT = next(field.default for field in FIELDS if field.name == "dataset_test_split")


def dataset_names(option: dict[str, Any]) -> list[str]:
    """What the training data is called in reports."""
    from fastdpo.data.mixtures import names_of, parse_mixture

    if option.get("datasets"):
        return [spec.label for spec in parse_mixture(option["datasets"])]
    return names_of(option["dataset_name"], option.get("dataset_dir"))


def load_data(option: dict[str, Any], args: "DPOConfig") -> "tuple[Dataset | IterableDataset, Dataset | None]":
    """Train and evaluation pairs; bad rows end the command here, before any model is loaded. With `dataset_streaming`
    training pairs are a stream, whose bad rows end it when they are reached.

    Raises:
        UsageError, DataError: one sentence (bad rows: one line each).
    """
    from fastdpo.cli.terminal import say
    from fastdpo.data.mixtures import load_mixture, split_off, stream_mixture

    size, eval_name = option["test_split_size"], option["eval_dataset_name"]
    if size is not None and eval_name is not None:
        raise UsageError("test_split_size and eval_dataset_name both name pairs to evaluate on: give one of them")
    seed = args.seed if args.data_seed is None else args.data_seed
    common = {
        "dataset_dir": option["dataset_dir"],
        "skip_bad_rows": args.skip_bad_rows,
        "max_samples": option["max_samples"],
        "seed": seed,
    }
    if option["dataset_streaming"]:
        _check_streaming(option, args)
        train = stream_mixture(_train_specs(option), **common)
    else:
        train = load_mixture(_train_specs(option), data_scale_rate=option["data_scale_rate"], **common)
    if size is not None:
        train, test = split_off(cast("Dataset", train), size, seed)
        used = args.eval_strategy != "no" or args.do_eval
        if not used:
            say(
                f"eval: the {len(test)} pairs split off by test_split_size are not used, since eval_strategy is 'no' "
                "(--do_eval scores them at the end)"
            )
        return train, test if used else None
    if eval_name is not None:
        return train, load_eval_dataset(option, common)
    if args.eval_strategy == "no":
        return train, None
    without = f"eval_strategy is '{option['eval_strategy']}' and there are no pairs to evaluate on"
    fix = "Give --test_split_size, --eval_dataset_name, or --eval_strategy no."
    if option["datasets"]:
        raise UsageError(f"{without}: `datasets` names training pairs. {fix}")
    try:
        return train, load_mixture(_specs(option, option["dataset_name"], option["dataset_test_split"]), **common)
    except ValueError as error:
        raise UsageError(f"{without}: {one_sentence(error)} {fix}") from error


def _check_streaming(option: dict[str, Any], args: "DPOConfig") -> None:
    if args.max_steps <= 0:
        raise UsageError("dataset_streaming needs max_steps, since nobody knows how long a stream is: give --max_steps")
    whole = {"test_split_size": None, "data_scale_rate": 1.0}
    for name, default in whole.items():
        if option[name] != default:
            raise UsageError(
                f"{name} needs all of the pairs, and dataset_streaming reads them as they come: leave one out"
            )
    for name in ("precompute_ref_log_probs", "max_tokens_per_batch"):
        if getattr(args, name):
            raise UsageError(
                f"{name} needs all of the pairs, and dataset_streaming reads them as they come: leave one out"
            )


def _train_specs(option: dict[str, Any]) -> list[Any]:
    from fastdpo.cli.terminal import say
    from fastdpo.data.mixtures import parse_mixture

    if not option["datasets"]:
        return _specs(option, option["dataset_name"], option["dataset_train_split"])
    if option["dataset_name"] is not None:
        say(f"data: dataset_name {option['dataset_name']} is not used, since `datasets` is given")
    return parse_mixture(option["datasets"])


def _specs(option: dict[str, Any], names: str, split: str) -> list[Any]:
    from fastdpo.data.mixtures import DatasetSpec, names_of

    return [
        DatasetSpec(name, name=option["dataset_config"], split=split) for name in names_of(names, option["dataset_dir"])
    ]


def load_eval_dataset(option: dict[str, Any], common: dict[str, Any]) -> "Dataset":
    """The pairs of eval_dataset_name: its split dataset_test_split, or what it has where that is the only one."""
    from fastdpo.data.mixtures import mix

    specs = _specs(option, option["eval_dataset_name"], option["dataset_test_split"])
    return mix([_load_eval_part(spec, option, common) for spec in specs], specs)


def _load_eval_part(spec: Any, option: dict[str, Any], common: dict[str, Any]) -> "Dataset":
    from dataclasses import replace

    from fastdpo.cli.terminal import say
    from fastdpo.data.formats import DataError
    from fastdpo.data.mixtures import load_mixture

    train = replace(spec, split="train")
    again = ": the pairs that are trained on" if spec.path in dataset_names(option) else ""
    if Path(spec.path).is_file() and spec.split == TEST_SPLIT:
        if again:
            say(f"eval: {spec.path} is all of a file{again}")
        return load_mixture([train], **common)  # a file's only split
    try:
        return load_mixture([spec], **common)
    except DataError:
        if spec.split != TEST_SPLIT:
            raise
        dataset = load_mixture([train], **common)
        say(f"eval: {spec.path} has no split {spec.split!r}, its split 'train' is used{again}")
        return dataset
