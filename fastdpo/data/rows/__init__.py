"""What a row may look like: each form that people bring becomes one `Preference`."""
