"""Configurations as the tools publish them, with their keys and small values, and rows of the shapes that they name.

MODEL, DATA, OUT and EVAL stand for paths.
"""

from typing import Any

COUNT = 8
AXOLOTL_REST = """
dataset_prepared_path:
output_dir: OUT
sequence_len: 256
sample_packing: false
wandb_project:
wandb_entity:
wandb_name:
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: false
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: sdpa
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
max_steps: 2
"""
AXOLOTL_LORA = """
adapter: lora
lora_model_dir:
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_linear: true
"""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rows(make: Any) -> list[dict[str, Any]]:
    return [make(f"What is {i} plus {i}?", f"It is {i + i}.", f"It is {i}.") for i in range(COUNT)]


def alpaca_messages(question: str, better: str, worse: str) -> dict[str, Any]:
    turns = [_message("system", "Be kind."), _message("user", question)]
    return {"conversation": turns, "chosen": _message("assistant", better), "rejected": _message("assistant", worse)}


def orca(question: str, better: str, worse: str) -> dict[str, Any]:
    return {"system": "Be kind.", "question": question, "chosen": better, "rejected": worse}


def ultrafeedback(question: str, better: str, worse: str) -> dict[str, Any]:
    asked = _message("user", question)
    answers = {"chosen": better, "rejected": worse}
    return {"prompt": question, **{side: [asked, _message("assistant", text)] for side, text in answers.items()}}


def dialogues(question: str, better: str, worse: str) -> dict[str, Any]:
    return {side: value for side, value in ultrafeedback(question, better, worse).items() if side != "prompt"}


def swift(question: str, better: str, worse: str) -> dict[str, Any]:
    return {"messages": [_message("user", question), _message("assistant", better)], "rejected_response": worse}


def instruct(question: str, better: str, worse: str) -> dict[str, Any]:
    return {"prompt": question, "chosen": f" {better}", "rejected": f" {worse}"}


def _unpaired() -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {i} plus {i}?", "completion": f"It is {i + i % 2 * i}.", "label": i % 2 == 1}
        for i in range(COUNT)
    ]


# a name -> the configuration (a YAML file, or words of a command line) and its rows
PUBLISHED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "axolotl dpo lora": (
        """
base_model: MODEL
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
special_tokens:
  pad_token: <|im_end|>
  eos_token: <|im_end|>
load_in_4bit: false
chat_template: llama3
rl: dpo
datasets:
  - path: DATA
    ds_type: json
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      system: [system]
      user: [user]
      assistant: [assistant]
val_set_size: 0.25
"""
        + AXOLOTL_LORA
        + AXOLOTL_REST,
        _rows(alpaca_messages),
    ),
    "axolotl ipo intel": (
        """
base_model: MODEL
rl: dpo
dpo_loss_type: [ipo]
rl_beta: 0.1
datasets:
  - path: DATA
    split: train
    type: chatml.intel
val_set_size: 0.0
shuffle_merged_datasets: true
loss_watchdog_threshold: 15.0
"""
        + AXOLOTL_REST,
        _rows(orca),
    ),
    "axolotl orpo": (
        """
base_model: MODEL
rl: orpo
orpo_alpha: 0.1
remove_unused_columns: false
chat_template: chatml
datasets:
  - path: DATA
    type: chat_template.argilla
val_set_size: 0.25
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
"""
        + AXOLOTL_LORA
        + AXOLOTL_REST,
        _rows(ultrafeedback),
    ),
    "axolotl kto": (
        """
base_model: MODEL
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
datasets:
  - path: DATA
    type: chatml.ultra
    split: train
val_set_size: 0.0
remove_unused_columns: false
eval_sample_packing: false
pad_to_sequence_len: false
gradient_checkpointing_kwargs:
  use_reentrant: false
"""
        + AXOLOTL_LORA
        + AXOLOTL_REST,
        _unpaired(),
    ),
    "handbook mixture": (
        """
model_name_or_path: MODEL
torch_dtype: null
dataset_mixture:
  datasets:
    - id: DATA
      config: null
      split: train
      columns: [chosen, rejected]
      weight: 1.0
    - id: DATA
      split: train
      columns: [chosen, rejected]
      weight: 0.5
  test_split_size: 4
  seed: 0
dataset_num_proc: 1
bf16: false
beta: 0.05
do_eval: true
do_train: true
eval_strategy: steps
eval_steps: 2
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: zephyr-7b-gemma-dpo
learning_rate: 5.0e-7
log_level: warning
logging_steps: 1
lr_scheduler_type: cosine
max_length: 256
max_prompt_length: 128
max_steps: 2
num_train_epochs: 1
optim: adamw_torch
output_dir: OUT
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
push_to_hub: false
report_to: none
save_strategy: "no"
seed: 42
warmup_ratio: 0.1
""",
        _rows(dialogues),
    ),
    "handbook mixer": (
        """
model_name_or_path: MODEL
torch_dtype: float32
use_peft: true
load_in_4bit: false
lora_r: 4
lora_alpha: 4
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
dataset_mixer:
  DATA: 1.0
dataset_splits:
- train
preprocessing_num_workers: 1
bf16: false
beta: 0.01
eval_strategy: "no"
gradient_accumulation_steps: 1
gradient_checkpointing: true
hub_model_id: zephyr-7b-dpo-qlora
learning_rate: 5.0e-6
logging_steps: 1
lr_scheduler_type: cosine
max_length: 256
max_prompt_length: 128
max_steps: 2
optim: adamw_torch
output_dir: OUT
per_device_train_batch_size: 2
save_strategy: "no"
seed: 42
warmup_ratio: 0.1
""",
        _rows(ultrafeedback),
    ),
    "handbook apo": (
        """
model_name_or_path: MODEL
model_revision: main
torch_dtype: float32
attn_implementation: sdpa
trust_remote_code: false
chat_template: "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"
dataset_mixture:
  datasets:
    - id: DATA
      split: train
      columns: [chosen, rejected, prompt]
      weight: 0.5
bf16: false
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 1
output_dir: OUT
run_name: SmolLM3-DPO
hub_strategy: every_save
learning_rate: 1.0e-06
logging_steps: 1
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_grad_norm: 0.2
beta: 0.05
loss_type: apo_zero
max_length: 256
max_steps: 1
overwrite_output_dir: true
per_device_train_batch_size: 1
padding_free: true
save_strategy: "no"
""",
        _rows(ultrafeedback),
    ),
    "ms-swift dpo lora": (
        "--rlhf_type dpo --model MODEL --tuner_type lora --dataset DATA --load_from_cache_file true "
        "--split_dataset_ratio 0.25 --torch_dtype float32 --num_train_epochs 1 --per_device_train_batch_size 1 "
        "--per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 4 --lora_alpha 8 --target_modules all-linear "
        "--gradient_accumulation_steps 2 --eval_steps 2 --save_steps 2 --save_total_limit 2 --logging_steps 1 "
        "--max_length 256 --output_dir OUT --warmup_ratio 0.05 --dataloader_num_workers 0 --rpo_alpha 0.1 "
        "--dataset_num_proc 1 --max_steps 2",
        _rows(swift),
    ),
    "ms-swift mpo full": (
        """
rlhf_type: dpo
model: MODEL
tuner_type: full
dataset: ['DATA#6']
load_from_cache_file: true
torch_dtype: float32
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
freeze_vit: true
freeze_aligner: true
learning_rate: 1e-5
save_steps: 100
logging_steps: 1
max_length: 256
output_dir: OUT
warmup_ratio: 0.05
max_steps: 1
save_only_model: true
""",
        _rows(swift),
    ),
    "ms-swift simpo": (
        "--rlhf_type simpo --model MODEL --train_type full --dataset DATA --torch_dtype float32 --learning_rate 1e-5 "
        "--gradient_accumulation_steps 1 --logging_steps 1 --max_length 256 --output_dir OUT --max_steps 1 "
        "--loss_scale last_round --truncation_strategy left",
        _rows(swift),
    ),
    "unsloth zephyr": (
        """
model_name: MODEL
max_seq_length: 256
dtype: null
load_in_4bit: false
r: 4
target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
lora_alpha: 4
lora_dropout: 0
bias: none
use_gradient_checkpointing: unsloth
random_state: 3407
use_rslora: false
loftq_config: null
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
warmup_ratio: 0.1
max_steps: 2
learning_rate: 5.0e-6
logging_steps: 1
optim: adamw_torch
weight_decay: 0.0
lr_scheduler_type: linear
seed: 42
output_dir: OUT
report_to: none
beta: 0.1
max_length: 256
max_prompt_length: 128
dataset_name: DATA
""",
        _rows(instruct),
    ),
    "unsloth orpo": (
        "--model_name MODEL --max_seq_length 256 --load_in_4bit false --r 4 --lora_alpha 4 --target_modules q_proj "
        "v_proj --use_gradient_checkpointing true --random_state 3407 --loss_type orpo --dataset DATA --max_steps 1 "
        "--output_dir OUT --logging_steps 1 --save_strategy no",
        _rows(dialogues),
    ),
    "unsloth full": (
        "--model_name MODEL --max_seq_length 256 --full_finetuning true --use_gradient_checkpointing unsloth "
        "--random_state 1 --dataset DATA --max_steps 1 --output_dir OUT --save_strategy no",
        _rows(instruct),
    ),
}
# what a run says: the step that it ends at, its pairs (or rows), and the first loss (kto: half of the rows count 0.2)
RESULTS = {
    "axolotl dpo lora": (2, 6, "0.6931"),
    "axolotl ipo intel": (2, 8, "25.0000"),
    "axolotl orpo": (2, 6, None),
    "axolotl kto": (2, 8, "0.3000"),
    "handbook mixture": (2, 8, "0.6931"),
    "handbook mixer": (2, 8, "0.6931"),
    "handbook apo": (1, 4, "1.0000"),
    "ms-swift dpo lora": (2, 6, None),
    "ms-swift mpo full": (1, 6, None),
    "ms-swift simpo": (1, 8, None),
    "unsloth zephyr": (2, 8, "0.6931"),
    "unsloth orpo": (1, 8, None),
    "unsloth full": (1, 8, "0.6931"),
}
