"""Use a finished run: generate, evaluate, chat and merge."""
