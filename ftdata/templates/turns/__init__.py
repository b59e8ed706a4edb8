"""Locate assistant turns and their stop tokens in a rendered text."""
