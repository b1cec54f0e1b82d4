"""fastdpo inside the trainers that people already have: a module for each, none imports its peer before its use."""
