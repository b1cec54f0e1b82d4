"""Every type of AutoModelForCausalLM, built tiny: right to float64's rounding, or refused with a true reason.

`sweep.yaml` says what each is, so that none changes its way unseen. A type that another transformers knows and the
table does not may take any way, if it is right.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdpo.models.forward import LogprobForward
from fastdpo.models.load import disable_dropout
from fastdpo.models.load_errors import check_causal_lm
from fastdpo.models.logit_transform import logit_transform

TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sweep.yaml").read_text(encoding="utf-8"))
WAYS: dict[str, str] = {kind: way for way, kinds in TABLE["ways"].items() for kind in kinds}
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# numbers of a tiny configuration, by the names that architectures give them
NUMBERS: dict[str, Any] = {name: value for value, names in TABLE["numbers"].items() for name in names.split()}
LAYERS = TABLE["layers"].split()


def tiny_config(kind: str) -> Any:
    """The type's default configuration, made small: one layer of each kind that it has, and two at least."""
    made = type(CONFIG_MAPPING[kind]().get_text_config()) if WAYS.get(kind) == "text alone" else CONFIG_MAPPING[kind]
    default = made()
    given = {name: value for name, value in NUMBERS.items() if _has(default, name)}
    given |= {"is_decoder": True} if _has(default, "is_decoder") else {}
    if "qk_rope_head_dim" in given:  # latent attention: each head has its own keys
        given["num_key_value_heads"] = given["num_attention_heads"]
    count = next((getattr(default, name) for name in LAYERS if isinstance(getattr(default, name, None), int)), 0)
    by_layer = {k: v for k, v in vars(default).items() if isinstance(v, list) and len(v) == count > 2}
    first = {str(kinds): index for index, kinds in reversed(list(enumerate(zip(*by_layer.values(), strict=True))))}
    chosen = sorted(first.values())[:6] or [0]
    chosen += [chosen[0] + 1] if len(chosen) == 1 else []
    given |= {name: [values[layer] for layer in chosen] for name, values in by_layer.items()}
    given |= {name: len(chosen) for name in LAYERS if _has(default, name)}
    return made(**{**given, **TABLE["special"].get(kind, {})})


def _has(config: Any, name: str) -> bool:
    return name in vars(config) or name in type(config).attribute_map


def build(kind: str, dtype: torch.dtype) -> Any:
    """A model in eval mode with peaked logits: their standard deviation is about 10 before a cap."""
    config = tiny_config(kind)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    architecture = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in architecture(config).parameters())
    assert size < 3_000_000, f"{kind} is not tiny: {size} parameters; see special in sweep.yaml"
    torch.manual_seed(0)
    # torch's grouped products take no float64
    options = {"experts_implementation": "eager"} if _has(config, "_experts_implementation_internal") else {}
    model = architecture._from_config(config, **options).to(dtype).eval()
    disable_dropout(model)
    weight, scale = model.get_output_embeddings().weight, logit_transform(config)[0]
    with torch.no_grad():
        weight.mul_(10 / scale / (weight.std() * weight.shape[1] ** 0.5))
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Constants that a model makes up are of the dtype as well."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 67, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


ROWS = torch.tensor([0, 3, 4, 10, 12 + 2, 12 + 6, 24 + 7])


def ours(model: Any, forward: LogprobForward) -> tuple[Tensor, Tensor]:
    inputs = batch()
    targets = inputs["input_ids"].flatten()[ROWS + 1]
    with forward.installed():
        return model(**inputs, logprob_rows=ROWS, logprob_targets=targets)["logprob"], targets


def own(model: Any, targets: Tensor) -> Tensor:
    logits = model(**batch(), use_cache=False).logits.flatten(0, 1)[ROWS].double()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def gradient(model: Any, logprob: Tensor) -> Tensor:
    """Of a weighted sum, over all parameters."""
    model.zero_grad()
    (logprob * torch.linspace(-1, 2, len(ROWS), dtype=logprob.dtype)).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def looks_ahead(model: Any) -> bool:
    ids = batch()["input_ids"][:1]
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 3 + 11) % 64 + 3
    with torch.no_grad():
        first, second = (model(input_ids=x, use_cache=False).logits[0, :-1] for x in (ids, changed))
    return float((first - second).abs().max()) > torch.finfo(first.dtype).eps ** 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("float64_stays")
@pytest.mark.parametrize("kind", TYPES)
def test_it_is_right_or_refused_with_a_true_reason(kind: str) -> None:
    way = refusal_by_config(kind)
    if way is None:
        dtype = torch.float32 if kind in TABLE["no_float64"] else torch.float64
        with default_dtype(dtype):
            way = way_of(kind, dtype)
    assert way == WAYS.get(kind, way)


def refusal_by_config(kind: str) -> str | None:
    config = CONFIG_MAPPING[kind](**TABLE["valid"].get(kind, {}))
    try:
        check_causal_lm(config)
    except ValueError as error:
        if "is an encoder-decoder model" in str(error):
            assert config.is_encoder_decoder
            return "encoder-decoder"
        if "is a multimodal model" in str(error):
            assert config.get_text_config() is not config
            return "multimodal"
        raise
    text = config if config.is_encoder_decoder else config.get_text_config()
    if text is not config:  # AutoModelForCausalLM loads its text model, which mostly has a row of its own
        if text.model_type not in TYPES:
            with default_dtype(torch.float64):
                assert way_of(kind, torch.float64) in ("head", "model")
        return "text alone"
    return None


def way_of(kind: str, dtype: torch.dtype) -> str:
    """The route, after a comparison with the model's own logits; or "not causal"."""
    model = build(kind, dtype)
    ahead = looks_ahead(model)
    try:
        forward = LogprobForward(model)
    except ValueError as error:
        if ahead and "is not causal: a later token changes the logits of an earlier one" in str(error):
            return "not causal"
        raise
    assert not ahead
    trains = kind not in TABLE["no_gradient"]
    error = 1e-8 if dtype == torch.float64 else 1e-4
    with nullcontext() if trains else torch.no_grad():
        found, targets = ours(model, forward)
        mine = gradient(model, found) if trains else torch.ones(1)
        wanted = own(model, targets)
        theirs = gradient(model, wanted) if trains else torch.ones(1)
    assert bool(wanted.isfinite().all())
    assert float(wanted.detach().std()) > 1, "the logits are too flat for a wrong scale or cap to show"
    torch.testing.assert_close(found.double(), wanted, rtol=error, atol=error)
    assert float((mine - theirs).norm() / theirs.norm()) < 100 * error
    return forward.route


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TABLE["transforms"] if kind in TYPES])
def test_scales_and_caps_are_right_in_bf16(kind: str) -> None:
    model = build(kind, torch.bfloat16)
    forward = LogprobForward(model)
    assert forward.route == WAYS[kind]
    with torch.no_grad():
        found, targets = ours(model, forward)
        wanted = own(model, targets)
        largest = model(**batch(), use_cache=False).logits.abs().max()
    # logits of 16 bits are off by half a unit of their last place, which eps is
    assert float((found - wanted).square().mean().sqrt()) < torch.finfo(torch.bfloat16).eps * float(largest)


def test_the_table_names_each_type_once() -> None:
    listed = [kind for kinds in TABLE["ways"].values() for kind in kinds]
    assert len(listed) == len(set(listed)) == 189
    assert set(TABLE["special"]) <= set(listed)
    assert {way: len(kinds) for way, kinds in TABLE["ways"].items()} == TABLE["counts"]
    if transformers.__version__ == TABLE["transformers"]:
        assert sorted(listed) == TYPES
