"""Reproducible problems. Each file has one function, which builds a `fedlearn.loop.scenario.Scenario`."""
