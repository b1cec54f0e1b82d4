"""Checkpoints that appear whole, and runs that resume exactly."""
