"""Run Flower's SuperLink, and require the operator's token for calls of its Control API.

Without a check of accounts, every client that reaches Flower's port can start and stop runs and admit nodes. Only
Flower's enterprise edition has such a check. This module uses the same interface to check the operator's token.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from fedlearn.deploy.coordinator_side.request_limits import MAX_CONNECTIONS, RequestLimits
from fedlearn.deploy.keys import KeysError, read_admitted
from fedlearn.flower.compat import run_superlink, signing_key

# environment variables: path of the file with the operator's token, folder of the admitted nodes' keys
TOKEN_FILE_ENV, NODES_ENV = "FEDLEARN_OPERATOR_TOKEN_FILE", "FEDLEARN_NODES"


class OperatorToken:
    """Check the operator's token of a call.

    Args:
        token: the right token.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def accepts(self, token: bytes) -> bool:
        """Return True for the right token; the comparison takes constant time."""
        return hmac.compare_digest(token, self._token)

    def is_in(self, headers: Mapping[str, str]) -> bool:
        """Return whether the headers of a request have the token."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self.accepts(token.strip().encode())


class AdmittedNodes:
    """Check that a request comes from an admitted node.

    Args:
        folder: folder with the public keys of the admitted nodes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: frozenset[bytes] = frozenset()
        self._files: object = None

    def have_signed(self, headers: Mapping[str, str]) -> bool:
        """Return whether the key of an admitted node has signed the headers."""
        key = signing_key(headers)
        return key is not None and key in self._read()

    def _read(self) -> frozenset[bytes]:
        files = sorted((path.name, path.stat().st_mtime_ns) for path in self.folder.glob("*.pub"))
        if files != self._files:
            try:
                self._keys, self._files = frozenset(read_admitted(self.folder)), files
            except (KeysError, OSError):  # a file that is being written
                return self._keys
        return self._keys


def main() -> None:
    """Run the SuperLink, with the command-line arguments of ``flower-superlink``."""
    token = OperatorToken(Path(os.environ[TOKEN_FILE_ENV]).read_text(encoding="ascii").strip())
    nodes = AdmittedNodes(Path(os.environ[NODES_ENV]))
    run_superlink(
        token.accepts,
        RequestLimits,
        max_connections=MAX_CONNECTIONS,
        is_node=nodes.have_signed,
        is_operator=token.is_in,
    )


if __name__ == "__main__":
    main()
