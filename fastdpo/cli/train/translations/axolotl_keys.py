"""axolotl's keys for preference training that `fastdpo train` does not have under the same name; code: `axolotl.py`.

Keys of transformers' TrainingArguments, and those that we share by name (`lora_r`, `simpo_gamma`, ...), are in neither.
"""

RENAMED = {
    "base_model": "model_name_or_path",
    "dataset_processes": "dataset_num_proc",
    "dpo_beta": "beta",
    "dpo_generate_during_eval": "generate_during_eval",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_padding_free": "padding_free",
    "dpo_use_liger_kernel": "use_liger_kernel",
    "dpo_use_weighting": "use_weighting",
    "eval_batch_size": "per_device_eval_batch_size",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "lora_model_dir": "adapter_name_or_path",
    "lr_scheduler": "lr_scheduler_type",
    "max_prompt_len": "max_prompt_length",
    "micro_batch_size": "per_device_train_batch_size",
    "mlflow_run_name": "run_name",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "revision_of_model": "model_revision",
    "rl_beta": "beta",
    "sequence_len": "max_length",
    "streaming": "dataset_streaming",
    "torch_dtype": "dtype",
    "wandb_name": "run_name",
}

# taken where a file says nothing, since they change what is trained; ours are TRL's
DEFAULTS = {
    "sequence_len": 512,
    "num_epochs": 1,
    "micro_batch_size": 1,
    "lr_scheduler": "cosine",
    "on_overlong": "drop",
}
LORA_DEFAULTS = {"lora_dropout": 0.0}

# what changes training and is not built, with what to do instead; refused where it is set
_NOT_BUILT = {
    "add the tokens to model and tokenizer first, and save both": "added_tokens_overrides fix_untrained_tokens "
    "resize_token_embeddings_to_32x shrink_embeddings tokens",
    "give gradient_accumulation_steps and micro_batch_size": "batch_size",
    "give DPOTrainer transformers' EarlyStoppingCallback in Python": "early_stopping_patience",
    "leave it out: preference losses score answers": "train_on_inputs",
    "leave it out": "adam_beta3 adam_epsilon2 cosine_constant_lr_ratio dion_lr dion_momentum dion_rank_fraction "
    "dion_rank_multiple_of dpo_norm_loss ebft embedding_lr embedding_lr_scale expert_parallel_size "
    "fp8 fp8_enable_fsdp_float8_all_gather grokfast_alpha grokfast_lamb jagged_restart_anneal_steps "
    "jagged_restart_steps jagged_restart_warmup_steps kd_alpha kd_ce_alpha kd_temperature kd_trainer "
    "lisa_layers_attribute lisa_n_layers lisa_step_interval llama4_linearized_experts loftq_config "
    "lora_alpha_pattern lora_fan_in_fan_out lora_rank_pattern loraplus_lr_embedding loraplus_lr_ratio "
    "lr_div_factor lr_groups lr_quadratic_warmup min_sample_len neftune_noise_scale "
    "peft_ensure_weight_tying peft_layer_replication peft_layers_pattern peft_layers_to_transform "
    "peft_trainable_token_indices pose_max_context_len pose_num_chunks pose_split_on_token_ids "
    "process_reward_model qat qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits "
    "qgalore_proj_group_size qgalore_proj_quant qgalore_proj_type qgalore_queue_size qgalore_rank "
    "qgalore_scale qgalore_update_proj_gap quantization reinit_weights relora relora_cpu_offload "
    "relora_prune_method relora_prune_ratio reward_model sage_attention scaling_softmax "
    "scaling_softmax_bias scaling_softmax_factor spectrum_model_name spectrum_top_fraction "
    "torchdistx_path use_eaft use_pose",
    "set it in the model's config.json": "model_config overrides_of_model_config "
    "overrides_of_model_kwargs rope_scaling",
    "write it into the rows (`chat_template_kwargs`)": "chat_template_kwargs",
    "max_length is that of evaluation too": "eval_sequence_len",
    "give load_in_4bit, or a model that is quantized": "gptq gptq_model_v1 gptq_groupsize model_quantization_config "
    "model_quantization_config_kwargs peft quantize_moe_experts",
    "give freeze_trainable_layers": "unfrozen_parameters",
    "take out the rows that stand twice": "dataset_exact_deduplication",
    "take part of the file": "dataset_shard_idx dataset_shard_num",
    "put the system message into the rows (`system`)": "default_system_message",
    "this trains on preferences": "pretraining_dataset",
    "start one process for each GPU instead": "context_parallel_size sequence_parallel_degree tensor_parallel_size",
    "leave it out: an adapter is merged by `fastdpo merge`": "merge_lora",
    "the model's folder says it": "base_model_config cls_model_config tokenizer_config",
    "use the trainer in Python": "trainer_cls",
}
REFUSED = {name: fix for fix, names in _NOT_BUILT.items() for name in names.split()}
# 1 is how these say that nothing is split
ONE_IS_NONE = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")

# what has no effect on the weights that come out, by the reason that the log line gives
NO_EFFECT = {
    "nothing is cached": "total_num_tokens total_supervised_tokens dataset_prepared_path "
    "dataset_keep_in_memory is_preprocess num_dataset_shards_to_save "
    "preprocess_iterable push_dataset_to_hub skip_prepare_dataset",
    "pairs are always shuffled": "shuffle_merged_datasets shuffle_before_merging_datasets",
    "batch_layout packs where that is exact": "batch_flattening eval_sample_packing flash_attn_cross_entropy "
    "flash_attn_fuse_mlp multipack_real_batches pad_to_sequence_len sample_packing sample_packing_bin_size "
    "sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method sample_packing_sequentially "
    "curriculum_sampling",
    "the model's folder says it": "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
    "is_qwen_derived_model model_type processor_type processor_kwargs type_of_model tokenizer_legacy tokenizer_type "
    "tokenizer_use_fast tokenizer_use_mistral_common tokenizer_save_jinja_files",
    "the chat template ends an answer": "eot_tokens",
    "it changes speed and memory only": "chunked_cross_entropy chunked_cross_entropy_num_chunks cut_cross_entropy "
    "deepcompile experimental_skip_move_to_device experts_implementation flash_optimum fused_attn_kernel "
    "gc_collect_steps gc_steps large_head_attention layer_offloading liger_cross_entropy "
    "dsv4_fp4_grouped_mode flash_attn_d512 flash_attn_rms_norm flex_attn_compile_kwargs "
    "dpo_use_logits_to_keep gemma4_hybrid_attn_impl liger_rms_norm_gated liger_swiglu liger_use_token_scaling "
    "mean_resizing_embeddings moe_bnb_fast moe_dequant_chunk_size sdpa_varlen use_dsv4_kernels use_glm_dsa_kernels "
    "liger_fused_linear_cross_entropy liger_glu_activation liger_layer_norm liger_rms_norm liger_rope "
    "lora_embedding_kernel lora_mlp_kernel lora_o_kernel lora_on_cpu lora_qkv_kernel low_cpu_mem_usage "
    "qlora_sharded_model_loading s2_attention selective_checkpointing tiled_mlp tiled_mlp_num_shards "
    "tiled_mlp_use_original_mlp torch_compile_options unsloth_cross_entropy_loss unsloth_lora_mlp "
    "unsloth_lora_o unsloth_lora_qkv unsloth_rope use_kernels use_onebitllms use_scattermoe use_sonicmoe",
    "plugins are not loaded": "plugins",
    "the launcher says how weights and GPUs are shared": "ddp device device_map dp_replicate_size dp_shard_size "
    "fsdp_final_state_dict_type fsdp_version gpu_memory_limit heads_k_stride max_memory ring_attn_func world_size",
    "a run that diverges stops (on_nan)": "loss_watchdog_patience loss_watchdog_threshold",
    "the tracker reads its environment variables": "comet_api_key comet_experiment_config comet_experiment_key "
    "comet_mode comet_online comet_project_name comet_workspace hf_mlflow_log_artifacts mlflow_experiment_name "
    "mlflow_tracking_uri swanlab_api_host swanlab_api_key swanlab_description swanlab_experiment_name "
    "swanlab_lark_secret swanlab_lark_webhook_url swanlab_log_model swanlab_mode swanlab_project swanlab_web_host "
    "swanlab_workspace trackio_project_name trackio_run_name "
    "wandb_entity wandb_log_model wandb_mode wandb_project wandb_run_id wandb_watch",
    "the environment variable HF_TOKEN is read": "hf_use_auth_token",
    "it belongs to another method": "center_rewards_coefficient do_bench_eval bench_dataset bench_split "
    "do_causal_lm_eval eaft_alpha eaft_k eval_causal_lm_metrics num_labels vllm",
    "generate_during_eval writes answers": "swanlab_completion_log_interval swanlab_completion_max_buffer "
    "swanlab_log_completions generate_samples generation_do_sample generation_max_new_tokens "
    "generation_prompt_ratio generation_temperature generation_top_k generation_top_p num_generation_samples "
    "eval_table_size eval_max_new_tokens",
    "it is for inference": "gradio_max_new_tokens gradio_server_name gradio_server_port "
    "gradio_share gradio_temperature gradio_title",
    "nothing is profiled": "include_tkps include_tokens_per_second profiler_steps profiler_steps_start "
    "otel_metrics_host otel_metrics_port use_otel_metrics",
    "Ray is not used": "ray_run_name ray_num_workers resources_per_worker use_ray",
    "checkpoints are of safetensors, and complete": "save_safetensors save_first_step",
    "unknown keys are refused always": "strict",
    "text models only": "freeze_mm_modules",
    "LoRA matrices are trained in float32": "peft_autocast_adapter_dtype embeddings_skip_upcast",
    "the last checkpoint is taken with resume_from_checkpoint": "auto_resume_from_checkpoints",
    "it belongs to `fastdpo merge`": "merge_method",
    "normalization is computed in float32": "fp32_norms fp32_norm_classes",
}
