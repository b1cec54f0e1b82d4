"""Causal LMs: loading, refusing, adapters, and a forward call that answers with log-probs."""
