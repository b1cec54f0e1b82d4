"""Log-probabilities of chosen tokens: from hidden states, from logits, and summed over sequences."""
