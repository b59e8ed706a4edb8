"""Modules that train a model on a build with TRL's `SFTTrainer`, and save the results."""
