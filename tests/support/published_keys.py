"""The keys of configurations that tools publish: axolotl's and ms-swift's examples for preference training,
alignment-handbook's recipes for dpo and orpo, and what unsloth's from_pretrained and get_peft_model take.
"""

KEYS = {
    "axolotl": """
accelerator_config adam_beta1 adam_beta2 adapter attn_implementation base_model bf16 chat_template
context_parallel_size dataset_exact_deduplication dataset_prepared_path datasets dp_replicate_size
dp_shard_size eot_tokens eval_sample_packing evals_per_epoch experimental_skip_move_to_device
flash_attention fsdp_config fsdp_version gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs kto_desirable_weight learning_rate load_in_4bit load_in_8bit logging_steps
lora_alpha lora_dropout lora_model_dir lora_modules_to_save lora_r lora_target_linear lora_target_modules
loss_watchdog_patience loss_watchdog_threshold lr_scheduler micro_batch_size model_type num_epochs optimizer
orpo_alpha output_dir pad_to_sequence_len plugins remove_unused_columns resume_from_checkpoint rl rl_beta
sample_packing save_steps save_strategy saves_per_epoch sequence_len shuffle_merged_datasets special_tokens
swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_description swanlab_experiment_name
swanlab_log_completions swanlab_log_model swanlab_mode swanlab_project swanlab_workspace
tensor_parallel_size tf32 tokenizer_type trust_remote_code use_kernels use_onebitllms use_scattermoe
use_sonicmoe use_swanlab val_set_size wandb_entity wandb_log_model wandb_name wandb_project wandb_watch
warmup_ratio warmup_steps weight_decay
""",
    "alignment-handbook": """
attn_implementation beta bf16 chat_template dataset_mixer dataset_mixture dataset_name dataset_num_proc
dataset_splits dataset_train_split do_eval do_train eval_steps eval_strategy gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs hub_model_id hub_model_revision hub_private_repo
hub_strategy learning_rate load_in_4bit log_level logging_steps logging_strategy lora_alpha lora_dropout
lora_r lora_target_modules loss_type lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length
max_prompt_length model_name_or_path model_revision num_train_epochs optim output_dir overwrite_output_dir
padding_free per_device_eval_batch_size per_device_train_batch_size preprocessing_num_workers push_to_hub report_to
run_name save_steps save_strategy save_total_limit seed torch_dtype trust_remote_code use_liger_kernel use_peft
warmup_ratio warmup_steps
""",
    "ms-swift": """
attn_impl dataloader_num_workers dataset dataset_num_proc deepspeed eval_steps freeze_aligner freeze_vit
gradient_accumulation_steps learning_rate load_from_cache_file logging_steps lora_alpha lora_rank loss_type
loss_weights max_length model num_train_epochs output_dir packing padding_free per_device_eval_batch_size
per_device_train_batch_size rlhf_type rpo_alpha save_only_model save_steps save_total_limit
sequence_parallel_size split_dataset_ratio target_modules torch_dtype train_type tuner_type use_liger_kernel
warmup_ratio
""",
    "unsloth": """
auto_model bias device_map disable_log_stats dtype ensure_weight_tying fast_inference finetune_attention_modules
finetune_audio_layers finetune_language_layers finetune_last_n_layers finetune_mlp_modules finetune_vision_layers
fix_tokenizer float32_mixed_precision float8_kv_cache full_finetuning fullgraph gpu_memory_utilization
init_lora_weights layers_pattern layers_to_transform load_in_16bit load_in_4bit load_in_8bit load_in_fp8
loftq_config lora_alpha lora_dropout max_lora_rank max_seq_length model_name modules_to_save offload_embedding
qat_scheme quantization_config r random_state resize_model_vocab return_logits revision rope_scaling
target_modules target_parameters task_type temporary_location text_only token trust_remote_code
unsloth_force_compile unsloth_tiled_mlp use_exact_model_name use_gradient_checkpointing use_rslora user_config
""",
}
# what tells that a configuration is of this tool
MARKS = {
    "axolotl": "base_model: m\nrl: dpo",
    "alignment-handbook": "dataset_mixture:\n  datasets:\n  - id: a",
    "ms-swift": "rlhf_type: dpo\nmodel: m",
    "unsloth": "model_name: m\nmax_seq_length: 64\nload_in_4bit: false",
}
