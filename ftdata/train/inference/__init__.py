"""Modules that use the model of a finished run: generation, evaluation, chat, and merging of the adapter."""
