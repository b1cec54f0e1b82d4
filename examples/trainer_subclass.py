"""DPO in a subclass of `transformers.Trainer` (one process; `fastdpo.DPOTrainer` is the one for DDP, FSDP and LoRA).

The collator names the hidden state of every scored token (`rows`): prompts and padding are never projected.
"""

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from fastdpo import DataCollatorForPreference, DPOLoss, linear_logprob, segment_sum


class MyDPOTrainer(Trainer):
    loss_is_scaled_for_ga = False  # the loss is a mean over pairs: Trainer divides it by the accumulation steps

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same, for older versions of transformers
        assert self.model is not None
        self.reference: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.dpo = DPOLoss(beta=0.1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        rows, targets, offsets = inputs["rows"], inputs["targets"], inputs["offsets"]
        call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        logps = []
        for one in (model, self.reference):  # the reference asks for no gradient, so none is made
            hidden = one.model(**call).last_hidden_state
            logps.append(segment_sum(linear_logprob(hidden, one.lm_head.weight, targets, rows=rows), offsets))
        loss, pairs = self.dpo(*logps)
        margin = (pairs.chosen_rewards - pairs.rejected_rewards).mean()
        print(f"step {self.state.global_step}: loss {loss.item():.4f}, reward margin {margin.item():.4f}")
        return (loss, pairs) if return_outputs else loss


set_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
draw = {"prompt_ids": (0, 128), "chosen_ids": (0, 64), "rejected_ids": (64, 128)}
data = [{name: torch.randint(*ids, (8,)).tolist() for name, ids in draw.items()} for _ in range(160)]
options = {"learning_rate": 2e-3, "num_train_epochs": 1, "remove_unused_columns": False}
args = TrainingArguments("output", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **options)
MyDPOTrainer(LlamaForCausalLM(config), args, DataCollatorForPreference(pad_token_id=0), data).train()
