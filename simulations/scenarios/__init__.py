"""Reproducible problems: one builder a file, returning a `fedlearn.scenario.Scenario`."""
