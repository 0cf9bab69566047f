"""Experiments: scenarios, models, and the commands that run them. Nothing in the library imports this package."""
