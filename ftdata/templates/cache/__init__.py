"""Reuse earlier renderings of a template."""
