"""Convert tokenizers without a `tokenizer.json`: SentencePiece models, tiktoken files and tekken files."""
