"""Verify a template: render small conversations with two independent renderers, and compare the results."""
