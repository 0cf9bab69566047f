"""Use undocumented names of Flower. No other package uses them.

Flower documents ``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp`` and ``flwr.simulation``. Each function of this
package checks the installed version before it uses another name, and imports that name only then.
"""
