"""DPOTrainer and DPOConfig on Hugging Face's Trainer, and what they need: models, reference, reports."""
