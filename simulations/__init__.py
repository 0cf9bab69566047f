"""Scenarios, models, and the commands of simulations. The library never imports this package."""
