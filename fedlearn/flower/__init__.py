"""Flower: wire format and adapters; the only home of flwr beside deploy and the engines grid and flower."""
