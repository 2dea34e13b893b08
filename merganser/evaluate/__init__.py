"""Scores: how well a model does each task with that task's own head."""
