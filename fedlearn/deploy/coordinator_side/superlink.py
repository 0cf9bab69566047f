"""Flower's SuperLink, with a token for whoever submits runs.

Flower lets anybody who reaches the port start runs, stop them and admit nodes, unless its enterprise edition checks
accounts. Its own interface for such checks is used here: a request to the Control API must carry the operator's token.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from fedlearn.flower.compat import run_superlink

TOKEN_FILE_ENV = "FEDLEARN_OPERATOR_TOKEN_FILE"  # names the environment variable


class OperatorToken:
    """The token that a request must carry."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def accepts(self, token: bytes) -> bool:
        """Return True for the right token; the comparison takes constant time."""
        return hmac.compare_digest(token, self._token)


def main() -> None:
    """Run the SuperLink; the arguments are those of ``flower-superlink``."""
    token = Path(os.environ[TOKEN_FILE_ENV]).read_text(encoding="ascii").strip()
    run_superlink(OperatorToken(token).accepts)


if __name__ == "__main__":
    main()
