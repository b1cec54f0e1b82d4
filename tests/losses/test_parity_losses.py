"""Every loss and option that TRL 1.16's DPOTrainer has, ours against its own trainer: 3 steps in fp32 on one model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.trainer import DPOTrainer

trl = pytest.importorskip("trl")

STEPS = 3
WORDS = [f"w{i}" for i in range(60)]
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
SMOOTHED = {"exo_pair": 0.05, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
CASES: dict[str, dict[str, Any]] = {
    name: {"loss_type": [name], "label_smoothing": SMOOTHED.get(name, 0.0)} for name in TRL_LOSSES
}
CASES |= {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "alpha_divergence, ipo": {"f_divergence_type": "alpha_divergence", "loss_type": ["ipo"]},
    "reverse_kl": {"f_divergence_type": "reverse_kl", "beta": 0.5},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.4},
    "ld, sft": {"ld_alpha": 0.4, "loss_type": ["sigmoid", "sft"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "wpo, two losses": {"loss_type": ["apo_zero", "nca_pair"], "loss_weights": [0.5, 2.0], "use_weighting": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose distributions are peaked, and a tokenizer of words."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] a setter of Rust
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.2, pad_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Completions of 1 to 12 words, chosen and rejected of other lengths."""
    draw = random.Random(1)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = [{"prompt": text(2, 5) + " ", "chosen": text(1, 12), "rejected": text(1, 12)} for _ in range(4 * STEPS)]
    return Dataset.from_list(rows)


def run(trainer: type, config: type, model: Path, pairs: Dataset, output: Path, **options: Any) -> list[dict]:
    arguments = config(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=3e-3,
        logging_steps=1,
        gradient_checkpointing=False,
        **options,
    )
    running = trainer(str(model), args=arguments, train_dataset=pairs)
    running.train()
    return [line for line in running.state.log_history if "loss" in line]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl_s(tmp_path: Path, folder: Path, pairs: Dataset, case: str) -> None:
    options = CASES[case]
    ours = run(DPOTrainer, DPOConfig, folder, pairs, tmp_path / "ours", **options)
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder, pairs, tmp_path / "trl", **options)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0]["loss"] != theirs[-1]["loss"]
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert mine[name] == pytest.approx(other[name], rel=5e-4), (step, name)
        # sft alone reads no reference, and here none is computed for the rewards either
        for name in () if case == "sft" else ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert mine[name] == pytest.approx(other[name], rel=5e-4, abs=1e-5), (step, name)


def test_the_cases_are_all_of_trl_s(folder: Path, pairs: Dataset, tmp_path: Path) -> None:
    """TRL's own message lists its losses: none is left out above."""
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        run(trl.DPOTrainer, trl.DPOConfig, folder, pairs, tmp_path, loss_type=["nothing"])
    named = str(caught.value).split("[")[1].split("]")[0].replace("'", "").split(", ")
    assert sorted(named) == sorted(TRL_LOSSES)


def test_label_smoothing_of_sigmoid_is_the_paper_s_where_trl_ignores_it(
    tmp_path: Path, folder: Path, pairs: Dataset
) -> None:
    e, beta = 0.2, 0.1
    smooth = run(DPOTrainer, DPOConfig, folder, pairs, tmp_path / "ours", label_smoothing=e)
    theirs = [run(trl.DPOTrainer, trl.DPOConfig, folder, pairs, tmp_path, label_smoothing=x) for x in (0.0, e)]
    assert [line["loss"] for line in theirs[0]] == [line["loss"] for line in theirs[1]]
    assert smooth[1]["loss"] != pytest.approx(theirs[0][1]["loss"], rel=5e-3)
    # at step 0 both labels cost ln 2, so the slope alone says it: (1 - e) - e of the plain one
    assert smooth[0]["grad_norm"] == pytest.approx((1 - 2 * e) * theirs[0][0]["grad_norm"], rel=5e-4)
    # cDPO's loss is the plain one + e * beta * h, by log s(h) - log s(-h) = h: on one pair, where means are numbers
    one = Dataset.from_list([dict(row) for row in pairs.select([0])] * 4)
    line = run(DPOTrainer, DPOConfig, folder, one, tmp_path / "one", label_smoothing=e, beta=beta)[-1]
    h = torch.tensor(line["rewards/margins"], dtype=torch.float64)
    expected = -(1 - e) * torch.nn.functional.logsigmoid(h) - e * torch.nn.functional.logsigmoid(-h)
    assert abs(h) > 1e-2
    assert line["loss"] == pytest.approx(float(expected), rel=1e-5)
