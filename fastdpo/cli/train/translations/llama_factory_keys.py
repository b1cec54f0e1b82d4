"""LLaMA-Factory's training arguments (0.9.0 to 0.9.5) that `fastdpo train` does not have under the same name.

What each becomes, as data; `llama_factory.py` has those that need code. Arguments of transformers' TrainingArguments,
and those that fastdpo shares by name (`ld_alpha`, `simpo_gamma`, `ref_model`, `use_dora`, ...), are in neither.
"""

RENAMED = {
    "additional_target": "lora_modules_to_save",
    "cutoff_len": "max_length",
    "dataset": "dataset_name",
    "double_quantization": "use_bnb_nested_quant",
    "dpo_label_smoothing": "label_smoothing",
    "enable_liger_kernel": "use_liger_kernel",
    "eval_dataset": "eval_dataset_name",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "lora_rank": "lora_r",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "preprocessing_num_workers": "dataset_num_proc",
    "quantization_type": "bnb_4bit_quant_type",
    "ref_model_adapters": "ref_adapters",
    "streaming": "dataset_streaming",
    "val_size": "test_split_size",
}

# taken where a file says nothing, since they change what is trained; ours are TRL's
DEFAULTS = {"cutoff_len": 2048, "learning_rate": 5e-5}
LORA_DEFAULTS = {"lora_rank": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}

# what changes training and is not built, with what to do instead; refused where it is set
REFUSED = {
    "add_special_tokens": "add the tokens to model and tokenizer first, and save both",
    "add_tokens": "add the tokens to model and tokenizer first, and save both",
    "default_system": "put the system message into the rows (`system`)",
    "early_stopping_steps": "give DPOTrainer transformers' EarlyStoppingCallback in Python",
    "fp8": "train in bf16",
    "interleave_probs": "give shares of datasets with `datasets` (fraction)",
    "loraplus_lr_ratio": "leave LoRA+ out",
    "mixture_of_depths": "leave it out",
    "neat_packing": "leave it out; packing of preference pairs is an argument of its own (batch_layout)",
    "new_special_tokens": "add the tokens to model and tokenizer first, and save both",
    "new_special_tokens_config": "add the tokens to model and tokenizer first, and save both",
    "packing": "leave it out; packing of preference pairs is an argument of its own (batch_layout)",
    "quantization_device_map": "leave it out",
    "resize_vocab": "resize the model's embeddings first, and save it",
    "rope_scaling": "set it in the model's config.json",
    "shift_attn": "leave it out",
    "split_special_tokens": "leave it out",
    "tokenized_path": "leave it out: pairs are tokenized at the start, from `dataset`",
    "train_from_scratch": "save a model with random weights, and give that",
    "train_on_prompt": "leave it out: preference losses score answers",
    "use_adam_mini": "set `optim` to one of transformers' optimizers",
    "use_apollo": "set `optim` to apollo_adamw, with optim_target_modules and optim_args",
    "use_badam": "set `optim` to one of transformers' optimizers",
    "use_galore": "set `optim` to galore_adamw, with optim_target_modules and optim_args",
    "use_hyper_parallel": "leave it out",
    "use_kt": "leave it out",
    "use_llama_pro": "leave it out",
    "use_mca": "leave it out",
    "use_muon": "set `optim` to one of transformers' optimizers",
}

# what has no effect on the weights that come out, by the reason that the log line gives
NO_EFFECT = {
    "curves are drawn for every run": "plot_loss",
    "nothing is cached": "data_shared_file_system overwrite_cache preprocessing_batch_size",
    "nothing is profiled": "enable_torch_profiler profile_modules profiler_active_steps profiler_output_dir "
    "profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps "
    "profiler_with_stack",
    "the launcher's is used": "master_addr master_port",
    "text models only": "audio_sampling_rate crop_to_patches freeze_language_model freeze_multi_modal_projector "
    "freeze_vision_tower image_dir image_do_pan_and_scan image_max_pixels image_min_pixels image_resolution media_dir "
    "train_mm_proj_only use_audio_in_video video_fps video_max_pixels video_maxlen video_min_pixels video_resolution",
    "it belongs to `fastdpo merge`": "export_device export_dir export_hub_model_id export_legacy_format "
    "export_quantization_bit export_quantization_dataset export_quantization_maxlen export_quantization_nsamples "
    "export_size",
    "it belongs to inference": "chunk_size cpu_infer do_sample eval_num_beams generation_config "
    "generation_max_length generation_num_beams infer_backend infer_dtype length_penalty max_new_tokens mode "
    "num_beams offload_folder predict_with_generate repetition_penalty sglang_config sglang_lora_backend "
    "sglang_maxlen sglang_mem_fraction sglang_tp_size skip_special_tokens temperature top_k top_p use_kv_cache "
    "vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen",
    "it belongs to stage ppo": "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model "
    "reward_model_adapters reward_model_quantization_bit reward_model_type",
    "it belongs to stage sft": "asft_alpha compute_accuracy eaft_alpha ignore_pad_token_for_loss sortish_sampler "
    "use_asft_loss use_dft_loss use_eaft_loss",
    "it belongs to a method that is not used": "apollo_layerwise apollo_proj apollo_proj_type apollo_rank "
    "apollo_scale apollo_scale_front apollo_scale_type apollo_target apollo_update_interval badam_mask_mode "
    "badam_mode badam_start_block badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose "
    "buffer_size fp8_backend fp8_enable_fsdp_float8_all_gather galore_layerwise galore_proj_type galore_rank "
    "galore_scale galore_target galore_update_interval hyper_parallel_args init_special_tokens "
    "kt_expert_checkpoint_path kt_force_think kt_lora_expert_intermediate_size kt_lora_expert_num kt_maxlen kt_mode "
    "kt_optimize_rule kt_use_cuda_graph kt_use_lora_experts kt_weight_path loraplus_lr_embedding module_dropout "
    "oft_block_size oft_rank oft_target pissa_iter",
    "Ray is not used": "placement_strategy ray_init_kwargs ray_num_workers ray_run_name ray_storage_filesystem "
    "ray_storage_path resources_per_worker",
    "SwanLab reads its environment variables": "swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url "
    "swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace",
    "the environment variable HF_TOKEN is read": "hf_hub_token ms_hub_token om_hub_token",
    "the environment variable HF_HOME is read": "cache_dir",
    "log-probs and norms are computed in fp32": "upcast_layernorm upcast_lmhead_output",
    "the tokenizer's own template is used": "enable_thinking preserve_thinking template tool_format",
    "all pairs are evaluated together": "eval_on_each_dataset",
    "it changes speed only": "low_cpu_mem_usage use_fast_tokenizer use_reentrant_gc use_unsloth use_unsloth_gc "
    "use_v1_kernels",
    "it is only printed": "include_effective_tokens_per_second print_param_status",
}
