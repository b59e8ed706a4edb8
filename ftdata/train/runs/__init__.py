"""Run SFTTrainer on a build."""
