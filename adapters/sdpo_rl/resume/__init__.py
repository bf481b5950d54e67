"""Checkpoints: the teacher and the progress within a generation batch, beside what the Trainer saves."""
