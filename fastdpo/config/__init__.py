"""DPOConfig: its fields, what it refuses, and the names that older trainers had for them."""
