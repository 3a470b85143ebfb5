"""Which remote images may be asked for: one parser of URLs, one list of hosts, one list of networks.

In: a URL as a client wrote it; an address as a resolver gave it. Out: where to go, or an InvalidImageUrlError.
It refuses whatever two parsers could read in two ways, and it opens no connection and asks no resolver.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_core.errors import ConfigError, InvalidImageUrlError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARACTERS = 4096
_PORTS = {"http": 80, "https": 443}

#: One strict grammar instead of a lenient library: printable ASCII without backslash, no userinfo, no IPv6 zone.
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?#][!-\[\]-~]*)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
#: A last label like these makes the resolver read the whole name as a number: 2130706433, 0x7f.1, 0177.0.0.1, 127.1.
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")

#: Not public, whatever the standard library of this Python says of them (3.11's `is_global` passes several).
_DENIED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
#: Only global unicast is public, so that v4-mapped, ::/96, NAT64, fc00::/7, fe80::/10, fec0::/10, ff00::/8 are not.
_ALLOWED_V6 = ipaddress.IPv6Network("2000::/3")
_DENIED_V6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)


def is_public(address: Address) -> bool:
    """Whether a server may be asked for a picture at this address on behalf of a stranger."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_V4)
    return address in _ALLOWED_V6 and not any(address in network for network in _DENIED_V6)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL points. `host` is lower case, an IPv6 address without brackets; `address` is set for literals."""

    scheme: str
    host: str
    port: int
    target: str
    address: Address | None

    @property
    def authority(self) -> str:
        """For the Host header: the ports are those of the schemes, so none is named."""
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_url(url: str) -> Target:
    """Raises InvalidImageUrlError, which never repeats the URL."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
    if match is None:
        raise refuse("this is not a plain image URL")
    scheme, host = match["scheme"].lower(), match["host"].lower()
    port = _PORTS[scheme] if match["port"] is None else int(match["port"])
    if port != _PORTS[scheme]:
        raise refuse("this port is not connected to", value=f"port {port}", allowed="80 for http, 443 for https")
    host, address = _read_host(host)
    target = (match["target"] or "/").partition("#")[0]
    return Target(scheme, host, port, target if target.startswith("/") else f"/{target}", address)


def _read_host(host: str) -> tuple[str, Address | None]:
    try:
        if host.startswith("["):
            v6 = ipaddress.IPv6Address(host[1:-1])
            return v6.compressed, v6
        host = host.removesuffix(".")
        if _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2]):
            v4 = ipaddress.IPv4Address(host)
            return str(v4), v4
    except ipaddress.AddressValueError:
        raise refuse("this address has an odd spelling", allowed="a host name, 1.2.3.4 or [2001:4860::1]") from None
    if not _NAME.fullmatch(host):
        raise refuse("this is not a host name")
    return host, None


def refuse(what: str, value: str | None = None, allowed: str = "") -> InvalidImageUrlError:
    return InvalidImageUrlError(
        what,
        value=value,
        allowed=allowed or "https://host/path in printable ASCII, without a user, a backslash or a port of its own",
        fix="Send the picture itself as a data URL",
    )


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts that images are fetched from: exact names, names under a `*.` domain, or all of them."""

    entries: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AllowedHosts:
        """`example.com, *.example.org, http://old.example`; `*` is any host. Raises ConfigError."""
        return cls(tuple(_entry(part.strip()) for part in text.split(",") if part.strip()))

    @property
    def is_empty(self) -> bool:
        return not self.entries

    def check(self, target: Target) -> None:
        """Raises InvalidImageUrlError unless the host is listed, and listed for plain http where that is asked for."""
        found = [may_be_plain for name, may_be_plain in self.entries if _matches(name, target.host)]
        if not found:
            raise refuse("images are not fetched from this host", allowed="the hosts that this server lists")
        if target.scheme == "http" and not any(found):
            raise refuse("images are not fetched over plain http from this host", allowed="https")


def _entry(text: str) -> tuple[str, bool]:
    name = text.lower()
    may_be_plain = name.startswith("http://")
    name = name.removeprefix("http://").removeprefix("https://")
    try:
        host = name if name == "*" else _read_host(name.removeprefix("*."))[0]
    except InvalidImageUrlError:
        host = ""
    if not host:
        raise ConfigError(
            "allowed_media_domains holds something that is no host",
            value=text,
            allowed="example.com, *.example.com, * for any public host; http:// before one allows plain http",
            fix="Name the host alone, without a port or a path",
        )
    return (f"*.{host}" if name.startswith("*.") else host), may_be_plain


def _matches(name: str, host: str) -> bool:
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


def check_addresses(addresses: Sequence[Address], is_allowed: Callable[[Address], bool] = is_public) -> None:
    """What a name resolved to: one answer that is not public spoils all, since the next lookup may pick it."""
    if not addresses or not all(is_allowed(address) for address in addresses):
        raise refuse("this host is not on the public internet", allowed="hosts whose every address is public")
