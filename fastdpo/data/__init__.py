"""Preference data: accepted row formats, tokenization with a scored-token mask, batches."""
