"""Attribute each character of a rendered text to a message or to the template."""
