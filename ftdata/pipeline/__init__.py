"""Turn rows into examples: render, tokenize, mask and truncate."""
