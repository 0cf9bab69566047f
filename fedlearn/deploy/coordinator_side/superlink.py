"""Run Flower's SuperLink, and require the operator's token for calls of its Control API.

Without a check of accounts, every client that reaches Flower's port can start and stop runs and admit nodes. Only
Flower's enterprise edition has such a check. This module uses the same interface to check the operator's token.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from fedlearn.flower.compat import run_superlink

TOKEN_FILE_ENV = "FEDLEARN_OPERATOR_TOKEN_FILE"  # environment variable with the path of the token file


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


def main() -> None:
    """Run the SuperLink, with the command-line arguments of ``flower-superlink``."""
    token = Path(os.environ[TOKEN_FILE_ENV]).read_text(encoding="ascii").strip()
    run_superlink(OperatorToken(token).accepts)


if __name__ == "__main__":
    main()
