"""Modules that load and quantize models, add adapters, and estimate the memory and time of a run."""
