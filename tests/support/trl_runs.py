"""The same run under a trainer of ours and of TRL's."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

STEPS = 20


def train(trainer: type, config: type, folder: Path, model: Path, pairs: Dataset, peft: bool, **options: Any) -> Any:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        max_steps=STEPS,
        max_length=256,
        learning_rate=1e-3,
        logging_steps=1,
        **{"per_device_train_batch_size": 2, **options},
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    running = trainer(
        str(model),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=adapter if peft else None,
    )
    running.train()
    return [line for line in running.state.log_history if "loss" in line]
