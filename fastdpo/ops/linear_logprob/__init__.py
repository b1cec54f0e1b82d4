"""The op: log-probs of chosen tokens from hidden states and a head, without the logits."""
