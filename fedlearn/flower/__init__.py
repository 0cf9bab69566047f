"""Flower: wire format and adapters; the only home of flwr beside deploy and engines.grid."""
