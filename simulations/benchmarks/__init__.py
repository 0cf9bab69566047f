"""Measure the speed of training: one definition of each workload, and one program per system.

The systems are fedlearn ("ours"), a hand-written program ("bare"), Flower and pfl-research.
``python -m simulations.benchmarks.speed workload=w1`` runs and compares them.
"""
