"""Reproducible experiments on real tasks; each suite makes a recipe and hands it to `merganser.run`."""

SUITES = ("text", "vision", "domains")
