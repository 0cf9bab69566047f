"""Privacy attacks on the updates of clients, one file each. ``python -m simulations.privacy_attack`` runs them."""
