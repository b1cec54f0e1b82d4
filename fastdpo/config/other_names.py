"""What other tools call what an argument does here: closer than spelling tells. No heavy import."""

from collections.abc import Collection

from fastdpo.wording import did_you_mean

# of axolotl, alignment-handbook, ms-swift, unsloth, LLaMA-Factory, torchtune and plain loops
_SAME = {
    "model_name_or_path": "model base_model model_id model_path model_name pretrained",
    "ref_model": "ref_model_name_or_path ref_model_path reference_model ref_model_id",
    "dataset_name": "dataset dataset_path data_path train_dataset train_file dataset_id",
    "eval_dataset_name": "eval_dataset val_dataset validation_file eval_file test_datasets",
    "test_split_size": "val_set_size val_size split_dataset_ratio test_size eval_split_ratio",
    "max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len model_max_length",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size micro_eval_batch_size",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "learning_rate": "lr learn_rate base_lr",
    "lora_r": "lora_rank lora_dim rank r peft_lora_r",
    "lora_alpha": "peft_lora_alpha alpha",
    "lora_target_modules": "lora_target target_modules lora_target_linear",
    "lora_modules_to_save": "modules_to_save additional_target",
    "beta": "dpo_beta pref_beta rl_beta kl_coef",
    "label_smoothing": "dpo_label_smoothing label_smoothing_factor_dpo",
    "loss_type": "pref_loss dpo_loss_type loss loss_fn",
    "optim": "optimizer optim_type",
    "lr_scheduler_type": "lr_scheduler scheduler lr_scheduler_name",
    "max_grad_norm": "gradient_clipping max_norm clip_grad grad_clip",
    "gradient_accumulation_steps": "grad_accum accumulate_grad_batches gradient_accumulation",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "deepspeed": "deepspeed_config ds_config",
    "fsdp_config": "fsdp_transformer_layer_cls",
    "dataset_num_proc": "preprocessing_num_workers dataset_processes num_proc",
    "save_steps": "saves_per_epoch save_every",
    "eval_steps": "evals_per_epoch val_check_interval eval_every",
    "use_bnb_nested_quant": "double_quantization",
    "attn_implementation": "attn_impl flash_attn attention_implementation",
    "dtype": "precision model_dtype compute_dtype",
    "adapter_name_or_path": "adapters adapter_path peft_model lora_model_dir resume_adapter",
    "output_dir": "output output_path save_dir",
    "rpo_alpha": "rpo_weight sft_weight",
    "use_liger_kernel": "enable_liger_kernel",
    "router_aux_loss_coef": "moe_aux_loss_coef",
    "bnb_4bit_quant_type": "quantization_type",
    "ref_adapters": "ref_model_adapters",
    "simpo_gamma": "simpo_margin gamma_beta_ratio",
}
OTHER_NAMES = {other: name for name, others in _SAME.items() for other in others.split()}

# what has no argument here, and what to do
_ADVICE = {
    "rlhf_type stage task trainer_type do_train_dpo": "leave it out: fastdpo train trains on preferences",
    "rl": "leave it out for dpo; ipo, orpo and simpo are values of loss_type",
    "dataset_mixer dataset_mixture": "list them in `datasets:`, each with `path` and its share as `fraction`",
    "train_type tuner_type finetuning_type adapter sft_type": "use_peft trains a LoRA; leave it out for all weights",
    "template chat_template_name prompt_template": "leave it out: the tokenizer's own chat template is taken",
    "flash_attention xformers_attention sdp_attention": "attn_implementation names it",
    "sample_packing packing pad_to_sequence_len": "leave it out: batch_layout packs pairs",
    "train_on_inputs train_on_prompt mask_history": "leave it out, or see scored_turns",
    "wandb_project wandb_name swanlab_project": "report_to names the tracker",
    "dpop": "not built",
}
ADVICE = {other: advice for others, advice in _ADVICE.items() for other in others.split()}


def meant_by(name: str, known: Collection[str], prefix: str = "") -> str:
    """What somebody who writes `name` means, as the end of a sentence: `here it is 'max_length'`; "" if nobody knows.

    known: the names that may be given here. prefix: what stands before a name, such as `--`.
    """
    other = OTHER_NAMES.get(name)
    if other is not None and other in known:
        return f"here it is '{prefix}{other}'"
    if name in ADVICE:
        return ADVICE[name]
    return did_you_mean(name, known, prefix=prefix)
