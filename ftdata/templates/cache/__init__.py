"""Caches that reuse earlier renderings of a template for similar conversations."""
