"""Finished runs: their metrics as pages, their answers, and an adapter merged into its base model."""
