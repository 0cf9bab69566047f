"""Attacks on what clients send, one file each; ``python -m simulations.attack`` runs them."""
