"""Secure aggregation: the server learns the sum of its clients' vectors, and nothing else about them.

`Client` and `Server` (in ``client.py`` and ``server.py``) are the protocol of Bonawitz et al. 2017 with its consistency
round, message in, message out; ``fixed.py`` turns real vectors into integers and back, ``discrete.py`` and ``cost.py``
are noise for those integers and what it is worth. README.md says what is promised and what is not.
"""
