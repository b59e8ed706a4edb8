"""Verify a template: render small conversations, and compare the results with a second renderer."""
