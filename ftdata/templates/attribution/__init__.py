"""Attribute every character of a rendered text to a message or to the template."""
