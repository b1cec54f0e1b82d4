"""The adapters of a PEFT model: which one is trained, which one runs, which one is saved where."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from fastdpo.config.dpo_config import DPOConfig

WEIGHTS = "adapter_model.safetensors"
Switch = Callable[[PeftModel], AbstractContextManager[None]]


def trained_adapter(model: PeftModel) -> str:
    """The name of the active adapter, the one that is trained."""
    return model.active_adapters[0]


def choose_adapters(model: nn.Module, args: DPOConfig) -> None:
    """Make `args.model_adapter_name` the active adapter, and see that `args.ref_adapter_name` is there, frozen.

    Raises:
        ValueError: a name that the model does not have or that cannot be used, one name for both, several active
            adapters, or one that is merged.
    """
    names = {field: getattr(args, field) for field in ("model_adapter_name", "ref_adapter_name")}
    for field, name in names.items():
        if name is None:
            continue
        check_adapter_name(field, name)
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"{field} is {name!r}, and the model has no adapter; pass a PeftModel that has one of this name."
            )
        if name not in model.peft_config:
            raise ValueError(
                f"{field} is {name!r}, and the model has no adapter of this name; it has "
                f"{', '.join(map(repr, model.peft_config))}."
            )
    if not isinstance(model, PeftModel):
        return
    trained = args.model_adapter_name
    if trained is not None and (model.active_adapters != [trained] or not _is_trainable(model, trained)):
        model.set_adapter(trained)
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active)}), and one can be trained; name it in "
            "model_adapter_name."
        )
    check_adapter_name("the trained adapter's name", active[0])
    merged = [name for layer in model.modules() if isinstance(layer, BaseTunerLayer) for name in layer.merged_adapters]
    if merged:
        raise ValueError(
            f"the adapter {merged[0]!r} is merged into the weights of its base model, so that switching adapters would "
            "not switch it; call unmerge_adapter() on the model first."
        )
    if args.ref_adapter_name == active[0]:
        raise ValueError(
            f"ref_adapter_name is {active[0]!r}, which is the adapter that is trained; name the other one in "
            "model_adapter_name."
        )
    if args.ref_adapter_name is not None:
        for tensor in adapter_tensors(model, args.ref_adapter_name):
            tensor.requires_grad_(False)


def check_adapter_name(field: str, name: str) -> None:
    """Raise ValueError unless PEFT can keep an adapter's parts and files under `name`; `field` is where it is from."""
    taken = hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
    if not name or taken or set(name) & set("./\\"):
        raise ValueError(
            f"{field} is {name!r}, which cannot name an adapter: it must be a folder's name without '.', '/' and "
            "'\\' that is no attribute of a torch module (such as 'train'); rename the adapter."
        )


def _is_trainable(model: PeftModel, name: str) -> bool:
    return any(tensor.requires_grad for tensor in adapter_tensors(model, name))


def adapter_tensors(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Every parameter and buffer of one adapter, trained copies of whole modules included."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for holder in module.children():
                # PEFT keeps an adapter's parts in dictionaries of modules, parameters or buffers, under its name
                if isinstance(holder, nn.ModuleDict) and name in holder:
                    yield from holder[name].parameters()
                    yield from holder[name].buffers()
                elif not isinstance(holder, nn.ModuleDict) and hasattr(holder, "keys") and name in cast(Any, holder):
                    yield cast(Any, holder)[name]


def trained_beside(model: PeftModel) -> list[str]:
    """Names of the trainable parameters that PEFT does not save with any adapter (it does save a LoRA's biases)."""
    own = {id(tensor) for name in model.peft_config for tensor in adapter_tensors(model, name)}
    beside = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    beside = [(name, tensor) for name, tensor in beside if id(tensor) not in own]
    if not beside:
        return []
    saved = [tensor for name in model.peft_config for tensor in adapter_state(model, name).values()]
    places = {tensor.data_ptr() for tensor in saved}
    return [name for name, tensor in beside if tensor.data_ptr() not in places]


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter as PEFT saves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when they are saved
        return get_peft_model_state_dict(model, adapter_name=name)


def plain_weights(model: nn.Module, running: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that log-probs under the adapters `running` depend on, whatever PEFT calls them.

    A weight of the base model has the name that it has without PEFT, and an adapter's has no adapter's name in it.
    """
    adapters = model.peft_config if isinstance(model, PeftModel) else ()
    owner = {id(tensor): name for name in adapters for tensor in adapter_tensors(model, name)}
    running = set(running)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        adapter = owner.get(id(tensor))
        if adapter is not None and adapter not in running:
            continue
        if adapter is not None:
            # the last one, after what it is a part of: a layer may have the same name
            before, _, after = f"{key}.".rpartition(f".{adapter}.")
            key = f"{before}.{after}".rstrip(".")
        elif adapters:
            key = ".".join(part for part in key.split(".") if part not in ("base_layer", "original_module"))
        yield key.removeprefix("base_model.model.") if adapters else key, tensor


def is_fresh(model: PeftModel, created: bool) -> bool:
    """Whether the policy is its base model still: the adapter adds nothing, and nothing but it is trained.

    created: the adapter was made from a `peft_config` just now, which settles it for kinds other than LoRA. A LoRA is
    looked at: PiSSA, OLoRA and others start from a base model that they have changed.
    """
    name = trained_adapter(model)
    own = {id(tensor) for tensor in adapter_tensors(model, name)}
    if any(parameter.requires_grad and id(parameter) not in own for parameter in model.parameters()):
        return False
    if model.peft_config[name].peft_type != PeftType.LORA:
        return created
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
                holders = (getattr(module, first), getattr(module, second))
                if name in holders[0] and all(_any(holder[name]) for holder in holders):
                    return False
            if module.lora_bias.get(name) and _any(module.lora_B[name]):
                return False
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            mine, other = module.modules_to_save[name].state_dict(), module.original_module.state_dict()
            if any(not bool((mine[key] == other[key]).all()) for key in other):
                return False
        elif isinstance(module, AuxiliaryTrainingWrapper) and not created:
            return False
    return True


def _any(part: nn.Module | Tensor) -> bool:
    tensors = part.parameters() if isinstance(part, nn.Module) else [part]
    return any(bool(tensor.detach().any()) for tensor in tensors)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch all adapters off; afterwards the active adapters and every requires_grad are what they were.

    PEFT's `disable_adapter` makes the active adapter trainable again on exit, even one loaded frozen.
    """
    with _restored(model), model.disable_adapter():
        yield


def adapter_on(name: str) -> Switch:
    """What runs a model under the adapter `name` alone, and restores the active one and every requires_grad."""

    @contextmanager
    def switch(model: PeftModel) -> Iterator[None]:
        with _restored(model):
            # of the tuner: `PeftModel.set_adapter` would keep a second record of what is active
            cast(Any, model.base_model).set_adapter(name)
            yield

    return switch


@contextmanager
def _restored(model: PeftModel) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters)
    try:
        yield
    finally:
        if model.active_adapters != active:
            cast(Any, model.base_model).set_adapter(active[0] if len(active) == 1 else active)
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def saved_at_root(model: PeftModel) -> Iterator[None]:
    """`model.save_pretrained` writes the trained adapter, and it alone, at the root of its folder.

    PEFT writes every adapter, each of another name than "default" into a folder of this name, where
    `PeftModel.from_pretrained` does not look.
    """
    name, save = trained_adapter(model), model.save_pretrained

    def save_at_root(save_directory: str, **options: Any) -> None:
        # beside, since a sub-folder of the adapter's name may be where it was loaded from
        with TemporaryDirectory(dir=save_directory, prefix=".adapter-") as staging:
            save(staging, selected_adapters=[name], **options)
            written = Path(staging) if name == "default" else Path(staging, name)
            for path in {Path(staging, "README.md"), *written.iterdir()}:
                os.replace(path, Path(save_directory, path.name))

    model.save_pretrained = save_at_root  # pyright: ignore[reportAttributeAccessIssue] on this instance, for a while
    try:
        yield
    finally:
        del model.save_pretrained


def reload_adapter(model: PeftModel, name: str, folder: str | os.PathLike[str]) -> None:
    """Load the weights in `folder` into the adapter `name`; what is trainable and active stays."""
    training = model.training
    with _restored(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Found missing adapter keys")  # the caller compares
        model.load_adapter(str(folder), name, is_trainable=name == trained_adapter(model))
    model.train(training)


def find_peft(model: nn.Module) -> PeftModel:
    """The PEFT model, or the one inside a wrapper."""
    return next(module for module in model.modules() if isinstance(module, PeftModel))


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """No dropout, no NEFTune noise, no activation checkpointing."""
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


def resize_to_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Give a base model's embedding the rows that it had when the adapter in the folder `adapter` was trained.

    They are known from an embedding or head that the adapter holds whole, or from tokens that it trains alone
    (`trainable_token_indices`) and its own tokenizer. New rows of other tokens are drawn.
    """
    rows = _stored_rows(model, Path(adapter, WEIGHTS)) or _token_rows(Path(adapter))
    if rows is None:
        return
    here = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if rows[0] != here and not (rows[1] and rows[0] < here):
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def _stored_rows(model: PreTrainedModel, weights: Path) -> tuple[int, bool] | None:
    """Rows of the embedding or head that is stored whole in the adapter, and False; None where neither is."""
    if not weights.is_file():
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
        for name in names:
            if f"base_model.model.{name}.weight" in stored:
                return file.get_slice(f"base_model.model.{name}.weight").get_shape()[0], False
    return None


def _token_rows(folder: Path) -> tuple[int, bool] | None:
    """The rows that `trainable_token_indices` needs at least, and True; None where the adapter trains no tokens."""
    indices = getattr(PeftConfig.from_pretrained(str(folder)), "trainable_token_indices", None)
    lists = list(indices.values()) if isinstance(indices, dict) else [indices or []]
    highest = max((index for some in lists for index in some), default=None)
    if highest is None:
        return None
    tokens = 0
    if Path(folder, "tokenizer_config.json").is_file():
        tokens = len(AutoTokenizer.from_pretrained(str(folder)))
    return max(highest + 1, tokens), True
