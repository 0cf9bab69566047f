"""Attacks on what clients send, one file each; ``python -m simulations.privacy_attack`` runs them."""
