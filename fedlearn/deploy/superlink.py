"""Flower's SuperLink, with a token for whoever submits runs.

Flower lets anybody who reaches the port start runs, stop them and admit nodes, unless its enterprise edition checks
accounts. Its own interface for such checks is used here: a request to the Control API must carry the operator's token.
"""

from __future__ import annotations

import hmac
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.auth.typing import AccountInfo
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli import flower_superlink as flower_command  # noqa: F401  (loads the module named below)

TOKEN_FILE = "FEDLEARN_OPERATOR_TOKEN_FILE"  # names the environment variable


class OperatorToken(NoOpControlAuthnPlugin):
    """Lets in who knows the token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Whether the request carries the token, compared in constant time."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, self._token):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def main() -> None:
    """Run the SuperLink; the arguments are those of ``flower-superlink``."""
    module = sys.modules["flwr.superlink.cli.flower_superlink"]
    token = Path(os.environ[TOKEN_FILE]).read_text(encoding="ascii").strip()
    module.load_control_authn_plugin = lambda: OperatorToken(token)  # type: ignore[attr-defined]
    module.flower_superlink()


if __name__ == "__main__":
    main()
