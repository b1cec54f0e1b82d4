"""fastdpo inside the trainers that people already have: one module for each, none imports its peer before it is used."""
