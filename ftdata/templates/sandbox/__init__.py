"""Compile and run untrusted templates."""
