"""What a run says of itself: metrics, speed, advice, files, the model card."""
