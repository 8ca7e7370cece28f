"""Which addresses audio may be fetched from.

A URL is taken apart once; what comes out is what is connected to, so no second reading of
the same text can disagree with the check. Host names are resolved once, every answer is
checked, and the caller connects to one of the addresses that were checked, never to the name.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from whisper_worker.errors import DownloadError, Forbidden

IPAddress = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Sequence[IPAddress]]

# IANA special-purpose registries (RFC 6890 and updates) and multicast.
_V4_NOT_PUBLIC = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_V6_UNICAST = IPv6Network("2000::/3")
# Teredo and its neighbours, documentation, 6to4, documentation again.
_V6_NOT_PUBLIC = tuple(IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_NAT64 = IPv6Network("64:ff9b::/96")

# Credentials of the machine are served here. No audio ever is, so a worker that may fetch
# from its private network must still not ask these.
_METADATA = frozenset(
    ip_address(address)
    for address in (
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
    )
)
# Names that RFC 6761, 6762, 8375 and 9476 and ICANN keep for use inside a network.
_LOCAL_NAME = re.compile(r"(^|\.)(localhost|localdomain|local|internal|intranet|lan|alt|home\.arpa)$")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*")
_NUMERIC_END = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)$")


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """An http or https URL taken apart. ``host`` is lower case, in ASCII, without brackets and final dot."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query as they go into the request line."""
    credentials: str | None = field(default=None, repr=False)
    """``user:password`` of the URL, percent-decoded."""

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


_PORTS = {"http": 80, "https": 443}


def parse_http_url(url: str) -> HttpUrl:
    """Take an http(s) URL apart. Raises :class:`Forbidden` for any other scheme and for a host that is not one."""
    from urllib.parse import unquote

    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    if url.partition(":")[0].lower() not in _PORTS:
        raise Forbidden("Only http, https and data URLs are taken; the URL must begin with one of them.")
    malformed = Forbidden("The URL's host or port is not a valid one; check how the URL is written.")
    try:
        parts = parse_url(url)
    except LocationParseError:
        raise malformed from None
    # Without brackets, zone and final dot: none of them belongs into a certificate's name or a Host header.
    host = (parts.host or "").strip("[]").partition("%")[0].removesuffix(".").lower()
    if re.search(r"[\x00-\x1f\x7f]", url) or not _HOST.fullmatch(host) or parts.scheme is None or parts.port == 0:
        raise malformed
    return HttpUrl(
        scheme=parts.scheme,
        host=host,
        port=parts.port or _PORTS[parts.scheme],
        target=parts.request_uri,
        credentials=None if parts.auth is None else unquote(parts.auth),
    )


def literal_address(host: str) -> IPAddress | None:
    """The address that ``host`` spells in any notation a system accepts; None for a name.

    Besides dotted decimals and IPv6 these are inet_aton's: 2130706433, 0x7f000001, 0177.0.0.1,
    127.1. A host that ends in a number but is none of these raises :class:`Forbidden`.
    """
    if ":" in host:
        try:
            return ip_address(host)
        except ValueError:
            raise Forbidden("The URL's host is not a valid IPv6 address.") from None
    if not _NUMERIC_END.search(host):
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        raise Forbidden("The URL's host is not a valid IPv4 address.") from None


def is_public(address: IPAddress) -> bool:
    """Whether ``address`` is one of the open internet's, an embedded IPv4 address being looked at too."""
    inner = _unwrapped(address)
    if isinstance(inner, IPv4Address):
        return not any(inner in block for block in _V4_NOT_PUBLIC)
    return inner in _V6_UNICAST and not any(inner in block for block in _V6_NOT_PUBLIC)


def _unwrapped(address: IPAddress) -> IPAddress:
    """The IPv4 address that a mapped or NAT64 address leads to; any other address as it is."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def resolve_host(host: str, port: int) -> list[IPAddress]:
    """Addresses of ``host`` by the system's resolver. Raises :class:`DownloadError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise DownloadError("The URL's host name could not be resolved for now; try again later.") from None
        raise DownloadError("The URL's host name does not exist; check the URL.", retryable=False) from None
    except UnicodeError:
        raise Forbidden("The URL's host is not a valid name.") from None
    return list(dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


class AddressGuard:
    """Says where a download may connect to; one method to override for a policy of one's own."""

    def __init__(self, *, allow_private: bool = False, resolve: Resolver = resolve_host) -> None:
        self._allow_private = allow_private
        self._resolve = resolve

    def permits(self, address: IPAddress, port: int) -> bool:
        """Whether ``address`` may be connected to at ``port``."""
        if _unwrapped(address) in _METADATA:
            return False
        return self._allow_private or is_public(address)

    def addresses(self, host: str, port: int) -> list[IPAddress]:
        """Checked addresses of ``host``, in the order to be tried.

        Raises :class:`Forbidden` if any of them may not be connected to: a name that answers with
        a public and a private address is not to be trusted with the choice.
        """
        literal = literal_address(host)
        if literal is None and not self._allow_private and (_LOCAL_NAME.search(host) or "." not in host):
            raise Forbidden("The URL's host is a name of a private network; only public addresses are fetched from.")
        found = [literal] if literal is not None else list(self._resolve(host, port))
        if not found:
            raise DownloadError("The URL's host name has no address; check the URL.", retryable=False)
        if not all(self.permits(address, port) for address in found):
            raise Forbidden(
                "The URL leads to a private, local or reserved address; only public addresses are fetched from "
                "(WHISPER_ALLOW_PRIVATE_URLS lifts this inside a trusted network)."
            )
        return found
