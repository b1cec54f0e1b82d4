"""`fastdpo train`: arguments and data files -> one run of DPOTrainer."""
