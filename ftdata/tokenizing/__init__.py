"""Load tokenizers and tokenize batches of texts with character offsets."""
