"""Check a template with probes and a second renderer."""
