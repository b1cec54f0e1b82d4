"""How the files of the demo were made; no run needs it."""
