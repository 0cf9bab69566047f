"""Name the HTTP(S) proxy of a connection. All connections of fedlearn follow the same environment variables."""

from __future__ import annotations

import os
import re
from urllib.request import getproxies_environment, proxy_bypass

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
CREDENTIALS = re.compile(r"//[^/@]*@")
SCHEMES = ("https", "all")  # the variables HTTPS_PROXY and ALL_PROXY, also in lower case


def find_proxy(host: str, port: int) -> str:
    """Return the variable and the proxy that HTTPS connections to a host use; empty without a proxy.

    A password in the variable is left out.

    Args:
        host: name or IP address, without brackets.
        port: port.
    """
    proxies = getproxies_environment()
    scheme = next((scheme for scheme in SCHEMES if proxies.get(scheme)), None)
    name = f"[{host}]" if ":" in host else host
    if scheme is None or proxy_bypass(f"{name}:{port}") or _is_excluded(host, proxies):
        return ""
    url = CREDENTIALS.sub("//", proxies[scheme])
    return f"{scheme.upper()}_PROXY={url}"


def exclude_from_proxies(*hosts: str) -> None:
    """Exclude hosts from the proxies of this process and its children, in the variable ``NO_PROXY``."""
    present = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = dict.fromkeys([*filter(None, (name.strip() for name in present.split(","))), *hosts])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def _is_excluded(host: str, proxies: dict[str, str]) -> bool:
    """Return whether ``NO_PROXY`` has an IPv6 address, which the standard library does not recognize."""
    return host in [name.strip().strip("[]") for name in proxies.get("no", "").split(",")]
