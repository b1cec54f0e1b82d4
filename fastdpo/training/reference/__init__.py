"""Reference policies: what each is, which one a run has, and log-probs that are computed once."""
