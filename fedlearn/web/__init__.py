"""Serve a live, read-only page of runs, for simulations and coordinators. It needs the extra ``web``."""
