"""Deploy fedlearn: the commands for coordinators, nodes and submitters. They need the extra ``flower``."""

from importlib.util import find_spec

from fedlearn.errors import MissingExtra

if any(find_spec(name) is None for name in ("cryptography", "flwr", "grpc", "grpc_health")):
    raise MissingExtra("fedlearn.deploy", "flower")
