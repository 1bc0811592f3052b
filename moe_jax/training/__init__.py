"""The run: its folder, its checkpoints, how it stops and resumes; the training step and loop."""
