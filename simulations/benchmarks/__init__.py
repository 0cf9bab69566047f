"""How fast is it? One definition of each piece of work, and the programs that do it: ours, bare, Flower's, pfl's.

``python -m simulations.benchmarks.speed workload=w1`` runs and compares them.
"""
