"""Convert rows to examples: render, tokenize, mask and truncate."""
