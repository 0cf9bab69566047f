"""Reproducible problems: one builder a file, returning a `fedlearn.loop.scenario.Scenario`."""
