"""Load, adapt, quantize and probe a model."""
