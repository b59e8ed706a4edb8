"""Load tokenizers, and convert batches of texts to token ids with character offsets."""
