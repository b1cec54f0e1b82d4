"""Configurations of other tools as arguments of `fastdpo train`: one table for each tool, read by `tool.py`."""
