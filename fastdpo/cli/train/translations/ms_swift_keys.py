"""ms-swift's arguments of `swift rlhf` that `fastdpo train` does not have under the same name; code: `ms_swift.py`."""

RENAMED = {
    "adapters": "adapter_name_or_path",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "cached_dataset_num_proc": "dataset_num_proc",
    "init_weights": "init_lora_weights",
    "lora_rank": "lora_r",
    "model": "model_name_or_path",
    "modules_to_save": "lora_modules_to_save",
    "streaming": "dataset_streaming",
    "target_parameters": "lora_target_parameters",
    "torch_dtype": "dtype",
}

# taken where nothing is said, since they change what is trained; ours are TRL's
DEFAULTS = {
    "adam_beta2": 0.95,
    "beta": 0.1,
    "lr_scheduler_type": "cosine",
    "max_length": None,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "truncation_strategy": "delete",
    "weight_decay": 0.1,
}
LORA_DEFAULTS = {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "all-linear"}
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}

# what changes training and is not built, with what to do instead; refused where it is set
_NOT_BUILT = {
    "add the tokens to model and tokenizer first, and save both": "new_special_tokens",
    "put the system message into the rows (`system`)": "system",
    "put the beginning of the answer into the rows": "response_prefix",
    "write a file with the rows that are meant": "cached_dataset cached_val_dataset custom_dataset_info "
    "custom_register_path external_plugins interleave_prob model_author",
    "set `optim` to galore_adamw, with optim_target_modules and optim_args": "use_galore",
    "set `optim` to one of transformers' optimizers": "optimizer",
    "set it in the model's config.json": "rope_scaling max_model_len",
    "give freeze_trainable_layers, without an adapter": "freeze_llm freeze_parameters freeze_parameters_ratio "
    "freeze_parameters_regex trainable_parameters trainable_parameters_regex",
    "name the modules in target_modules": "target_regex",
    "start one process for each GPU instead": "sequence_parallel_size deepspeed_autotp_size",
    "give num_train_epochs or max_steps": "max_epochs",
    "give DPOTrainer callbacks in Python": "callbacks early_stop_interval",
    "leave it out": "aligner_lr enable_channel_loss enable_dft_loss hqq_axis init_strategy is_binary_loss_scale "
    "lisa_activated_layers lora_bias_trainable lorap_lr_ratio model_kwargs num_labels problem_type "
    "train_from_scratch use_swift_lora vit_lr zero_hpz_partition_size",
}
REFUSED = {name: fix for fix, names in _NOT_BUILT.items() for name in names.split()}

# what has no effect on the weights that come out, by the reason that the log line gives
NO_EFFECT = {
    "nothing is cached": "download_mode lazy_tokenize load_args load_data_args load_from_cache_file",
    "pairs are always shuffled": "dataset_shuffle shuffle_buffer_size stopping_strategy train_dataloader_shuffle "
    "val_dataset_shuffle",
    "batch_layout packs where that is exact": "packing packing_length packing_num_proc packing_strategy padding_side",
    "the tokenizer's own template is used": "add_non_thinking_prefix agent_template disable_ignore_empty_think "
    "enable_thinking preserve_thinking template template_backend use_chat_template",
    "the model's folder says it": "local_repo_path model_type ref_model_type",
    "names are those of the Hugging Face hub": "ref_model_revision use_hf",
    "it names the model in texts about itself": "model_name",
    "text models only": "freeze_aligner freeze_vit max_pixels norm_bbox vit_gradient_checkpointing",
    "the launcher says how weights and GPUs are shared": "device_map max_memory use_ray",
    "it changes speed and memory only": "attn_backend bnb_4bit_compute_dtype check_model ds3_gather_for_generation "
    "enable_npu_model_patch experts_impl use_flash_ckpt use_logits_to_keep lora_dtype",
    "it belongs to another method": "center_rewards_coefficient cliprange cliprange_value gamma gkd_logits_topk "
    "kl_coef lam lmbda local_rollout_forward_batch_size log_completions max_new_tokens missing_eos_penalty "
    "num_iterations num_mini_batches num_ppo_epochs num_sample_generations response_length reward_model_revision "
    "reward_model_type reward_template teacher_adapters teacher_deepspeed teacher_model_revision teacher_model_server "
    "teacher_model_type mrl_dims num_generations offload_teacher_model reward_adapters reward_funcs "
    "reward_model reward_weights seq_kd sft_alpha teacher_model temperature use_vllm vf_coef whiten_rewards",
    "it belongs to a tuner that is not used": "adalora_beta1 adalora_beta2 adalora_orth_reg_weight adalora_tfinal "
    "adalora_tinit boft_block_num boft_n_butterfly_factor fourier_scaling galore_cos_threshold galore_gamma_proj "
    "galore_optim_per_parameter galore_proj_bits galore_proj_group_size galore_proj_quant galore_proj_type "
    "galore_quantization galore_queue_size galore_scale galore_target_modules galore_update_proj_gap "
    "galore_with_embedding llamapro_num_groups lora_ga_direction lora_ga_iters lora_ga_max_length lora_ga_scale "
    "lora_ga_stable_gamma reft_args reft_intervention_type reft_layer_key reft_layers vera_d_initial vera_dropout "
    "vera_projection_prng_key adalora_init_r adalora_target_r adapter_act adapter_length "
    "boft_block_size boft_dropout galore_rank llamapro_num_new_blocks lora_ga_batch_size reft_rank vera_rank "
    "lisa_step_interval fourier_n_frequency",
    "bad rows stop the run (skip_bad_rows)": "strict",
    "columns are found by their names": "disable_auto_column_mapping",
    "output_dir is taken as it is": "add_version create_checkpoint_symlink logging_dir",
    "checkpoints are of safetensors, and complete": "max_shard_size safe_serialization resume_only_model",
    "the tracker reads its environment variables": "swanlab_email_language swanlab_notification_method "
    "swanlab_receiver_email swanlab_secret swanlab_sender_email swanlab_smtp_port swanlab_smtp_server "
    "swanlab_webhook_url swanlab_exp_name swanlab_mode swanlab_project swanlab_token "
    "swanlab_workspace",
    "unknown names are refused always": "ignore_args_error",
    "losses are a mean over pairs": "acc_strategy",
    "nothing is run after training": "eval_dataset eval_dataset_args eval_generation_config eval_limit eval_metric "
    "eval_use_evalscope extra_eval_args",
}
