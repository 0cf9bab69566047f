"""Secure aggregation: the server learns only the sum of the vectors of its clients.

`Client` and `Server` (in ``client.py`` and ``server.py``) run the protocol of Bonawitz et al. 2017 with its consistency
round. They return a message for each message. ``fixed_point.py`` encodes real vectors as integers,
``discrete_noise.py`` draws noise for them, and ``cost.py`` computes the privacy cost. README.md states the guarantees.
"""
