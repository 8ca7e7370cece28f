"""Which addresses are let through, in every notation that some system understands."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_worker.audio.address import AddressGuard, HttpUrl, IPAddress, is_public, literal_address, parse_http_url
from whisper_worker.errors import DownloadError, Forbidden

PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"]

NOT_PUBLIC = {
    "0.0.0.0": "this host",
    "0.1.2.3": "this network",
    "10.0.0.1": "private",
    "172.16.0.1": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "169.254.1.1": "link-local",
    "169.254.169.254": "metadata",
    "100.64.0.1": "carrier-grade NAT",
    "100.127.255.255": "carrier-grade NAT",
    "192.0.0.8": "protocol assignments",
    "192.0.2.1": "documentation",
    "198.51.100.1": "documentation",
    "203.0.113.1": "documentation",
    "192.88.99.1": "6to4 relay",
    "198.18.0.1": "benchmarking",
    "198.19.255.255": "benchmarking",
    "224.0.0.1": "multicast",
    "239.255.255.255": "multicast",
    "240.0.0.1": "reserved",
    "255.255.255.255": "broadcast",
    "::": "unspecified",
    "::1": "loopback",
    "::127.0.0.1": "IPv4-compatible",
    "::8.8.8.8": "IPv4-compatible",
    "::ffff:127.0.0.1": "IPv4-mapped",
    "::ffff:a9fe:a9fe": "IPv4-mapped",
    "::ffff:0:127.0.0.1": "IPv4-translated",
    "64:ff9b::127.0.0.1": "NAT64",
    "64:ff9b::a00:1": "NAT64",
    "64:ff9b:1::808:808": "local NAT64",
    "100::1": "discard",
    "2001::1": "Teredo",
    "2001:0:53aa:64c:0:7b:80ff:fffe": "Teredo",
    "2001:2::1": "benchmarking",
    "2001:10::1": "ORCHID",
    "2001:db8::1": "documentation",
    "2002:7f00:1::": "6to4",
    "2002:808:808::": "6to4",
    "3fff::1": "documentation",
    "5f00::1": "segment routing",
    "fc00::1": "unique local",
    "fd00:ec2::254": "metadata",
    "fe80::1": "link-local",
    "fec0::1": "site-local",
    "ff02::1": "multicast",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))
    assert AddressGuard().permits(ip_address(address), 443)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_of_registries_are_not(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not AddressGuard().permits(ip_address(address), 80)


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_let_through(address: IPAddress) -> None:
    """An independent table, Python's, may be narrower than ours, never wider."""
    if address.is_private and address.version == 4:
        assert not is_public(address)
    if is_public(address) and address not in ip_network("64:ff9b::/96"):
        assert not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


SAME_AS_LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7F.1",
    "0x7f.0x0.0x0.0x1",
    "0177.0.0.1",
    "0177.0.0.01",
    "017700000001",
    "127.0.0.1.",
    "127%2e0%2E0%2e1",
    "[::ffff:127.0.0.1]",
    "[::FFFF:7F00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
]


@pytest.mark.parametrize("host", SAME_AS_LOOPBACK)
def test_every_notation_is_read_as_the_address_it_is(host: str) -> None:
    address = literal_address(parse_http_url(f"http://{host}:8080/").host)
    assert address is not None
    mapped = getattr(address, "ipv4_mapped", None)
    assert (mapped or address) == ip_address("127.0.0.1")


@given(st.ip_addresses(v=4), st.sampled_from(["{}", "{:#x}", "{:#o}"]))
def test_whole_numbers_are_read_as_addresses(address: IPAddress, form: str) -> None:
    spelt = form.format(int(address)).replace("0o", "0")
    assert literal_address(spelt) == address


@pytest.mark.parametrize(
    "host", ["256.0.0.1", "1.2.3.4.5", "4294967296", "0x", "0x1ffffffff", "127.0.0.0x", "08.8.8.8", "a.b.1"]
)
def test_a_number_that_is_no_address_is_not_looked_up(host: str) -> None:
    with pytest.raises(Forbidden):
        literal_address(host)


@pytest.mark.parametrize("host", ["example.com", "1e100.net", "0xdead.example", "127.0.0.1.example.com"])
def test_names_are_names(host: str) -> None:
    assert literal_address(host) is None


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "gopher://127.0.0.1:70/_x",
        "ftp://example.com/a.mp3",
        "dict://example.com:11211/stats",
        "jar:http://example.com!/",
        "javascript:alert(1)",
        "//example.com/a.mp3",
        "example.com/a.mp3",
        "/etc/passwd",
        "C:\\talk.wav",
        "http:/example.com/",
        "http:example.com",
        "http://",
        "http:///a.mp3",
        "http://[::1",
        "http://example.com:99999/",
        "http://example.com:0/",
        "http://example.com:x/",
        "http://exa mple.com/",
        "http://example..com/",
        "http://.example.com/",
        "http://127.0.0.1../",
        "http://exam\tple.com/",
        "http://example.com/\r\nX: y",
        "http://①②⑦.⓪.⓪.①/",
        "http://１２７.0.0.1/",
        "http://127。0。0。1/",
        "http://example.com%00.evil/",
        "http://exa%mple.com/",
    ],
)
def test_what_is_no_http_url_is_forbidden(url: str) -> None:
    with pytest.raises(Forbidden):
        parse_http_url(url)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://public.example@127.0.0.1/", "127.0.0.1"),
        ("http://127.0.0.1@public.example/", "public.example"),
        ("http://a:b@127.0.0.1:80@public.example/", "public.example"),
        ("http://127.0.0.1#@public.example/", "127.0.0.1"),
        ("http://127.0.0.1?@public.example/", "127.0.0.1"),
        ("http://127.0.0.1\\@public.example/", "127.0.0.1"),
        ("http://public.example/@127.0.0.1/", "public.example"),
    ],
)
def test_the_host_is_the_one_that_is_connected_to(url: str, host: str) -> None:
    assert parse_http_url(url).host == host


def test_a_url_is_taken_apart() -> None:
    url = parse_http_url("HTTPS://Us%40er:p%3Aw@BÜCHER.example.:8443/ä b/../c?q=1&r=ü#part")
    assert url == HttpUrl("https", "xn--bcher-kva.example", 8443, "/c?q=1&r=%C3%BC", "Us@er:p:w")
    assert url.host_header == "xn--bcher-kva.example:8443"
    assert url.origin == ("https", "xn--bcher-kva.example", 8443)
    assert "p:w" not in repr(url)
    assert parse_http_url("http://[2606:4700::1111%25eth0]/").host_header == "[2606:4700::1111]"
    assert parse_http_url("https://example.com:443").host_header == "example.com"


def resolves_to(*addresses: str) -> AddressGuard:
    return AddressGuard(resolve=lambda host, port: [ip_address(address) for address in addresses])


def test_all_answers_must_be_public() -> None:
    assert resolves_to("1.1.1.1", "2606:4700::1111").addresses("a.example", 80) == [
        ip_address("1.1.1.1"),
        ip_address("2606:4700::1111"),
    ]
    for answers in (("127.0.0.1",), ("1.1.1.1", "10.0.0.1"), ("::1", "1.1.1.1")):
        with pytest.raises(Forbidden, match="WHISPER_ALLOW_PRIVATE_URLS"):
            resolves_to(*answers).addresses("a.example", 80)
    with pytest.raises(DownloadError):
        resolves_to().addresses("a.example", 80)


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.localhost", "printer.local", "metadata.google.internal", "router.lan", "x.home.arpa", "redis"],
)
def test_names_of_private_networks_are_not_looked_up(host: str) -> None:
    def never(host: str, port: int) -> list[IPAddress]:
        raise AssertionError("looked up")

    with pytest.raises(Forbidden):
        AddressGuard(resolve=never).addresses(host, 80)


def test_private_addresses_can_be_allowed_but_metadata_never() -> None:
    guard = AddressGuard(allow_private=True, resolve=lambda host, port: [ip_address("10.0.0.5")])
    assert guard.addresses("redis", 80) == [ip_address("10.0.0.5")]
    assert guard.addresses("127.1", 80) == [ip_address("127.0.0.1")]
    for host in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254", "2852039166"):
        with pytest.raises(Forbidden):
            guard.addresses(host, 80)
