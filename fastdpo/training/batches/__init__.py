"""How pairs become batches: their layout, and how many a batch has."""
