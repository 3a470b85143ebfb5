"""Rows 1 to 4 of the hostile inputs: what is refused from the URL or the resolver's answer alone."""

import ipaddress

import pytest

from model_core.errors import ConfigError, InvalidImageUrlError
from service.addresses import AllowedHosts, check_addresses, is_public, parse_url

ANY = AllowedHosts.parse("*, http://*")

PRIVATE = (
    "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255",
    "169.254.169.254", "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:10::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1",
    "5f00::1", "fc00::1", "fd00::1", "fe80::1", "fec0::1", "ff02::1", "4000::1",
)  # fmt: skip
PUBLIC = (
    "8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "223.255.255.255", "198.20.0.1",
    "2606:4700::1111", "2a00:1450::1", "2001:4860:4860::8888", "2003::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_networks_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_networks_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        # Spellings of numbers that resolvers read and people do not.
        "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/", "http://0x7f000001/x",
        "http://127.0.0.0x1/", "http://1.2.3.04/", "http://a.1/", "http://1.2.3.4.5/", "http://0x/",
        # Two parsers, two hosts.
        "http://allowed.com\\@127.0.0.1/", "http://user@host.com/", "http://user:pass@host.com/",
        "http://host.com:443@127.0.0.1/", "http://host.com:x/", "http://[::1/", "http://[fe80::1%25eth0]/",
        "http://ho st.com/", "http://host.com/a b", "http://host.com/\r\nx: y", "http://host.com/\tx", "http://ho\0st/",
        "http://host%2ecom/", "http://h\u00f6st.com/", "http://host.com/\u00e9", "http:///x", "http:host.com", "http://",
        "https//host.com", "//host.com/x", "http://.host.com/", "http://ho..st/", "http://-a.com/", "http://a-.com/",
        "http://host.com:22/", "https://host.com:80/", "http://host.com:443/", "https://host.com:99999/",
        # Other schemes, and paths.
        "file:///etc/passwd", "gopher://host.com/", "ftp://host.com/x", "/etc/passwd", "C:\\x.png", "", "x",
        "http://host.com/" + "x" * 4096,
    ],
)  # fmt: skip
def test_urls_that_are_not_plain(url: str) -> None:
    with pytest.raises(InvalidImageUrlError) as caught:
        parse_url(url)
    assert len(url) < 4 or url not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://Example.COM", ("https", "example.com", 443, "/")),
        ("HTTP://a.b.c./x?y=1#z", ("http", "a.b.c", 80, "/x?y=1")),
        ("https://a.com:443?q", ("https", "a.com", 443, "/?q")),
        ("https://a.com#z", ("https", "a.com", 443, "/")),
        ("https://8.8.8.8/x", ("https", "8.8.8.8", 443, "/x")),
        ("https://[2606:4700:0:0::1111]/x", ("https", "2606:4700::1111", 443, "/x")),
    ],
)
def test_plain_urls(url: str, parts: tuple[str, str, int, str]) -> None:
    target = parse_url(url)
    assert (target.scheme, target.host, target.port, target.target) == parts
    assert (target.address is not None) == (parts[1][0] in "82")
    assert target.authority == ("[2606:4700::1111]" if ":" in parts[1] else parts[1])


@pytest.mark.parametrize(
    ("entries", "url", "is_allowed"),
    [
        ("", "https://a.com/", False),
        ("a.com", "https://a.com/", True),
        ("a.com", "https://b.a.com/", False),
        ("a.com", "https://xa.com/", False),
        ("a.com", "http://a.com/", False),
        ("http://a.com", "http://a.com/", True),
        ("http://a.com", "https://a.com/", True),
        ("*.a.com", "https://b.a.com/", True),
        ("*.a.com", "https://c.b.a.com/", True),
        ("*.a.com", "https://a.com/", False),
        ("*.a.com", "https://xa.com/", False),
        ("http://*.a.com, b.com", "http://x.a.com/", True),
        ("http://*.a.com, b.com", "http://b.com/", False),
        ("*", "https://anything.example/", True),
        ("*", "http://anything.example/", False),
        ("*,http://*", "http://anything.example/", True),
        ("A.com. ,", "https://a.com/", True),
        ("8.8.8.8", "https://8.8.8.8/", True),
    ],
)
def test_listed_hosts(entries: str, url: str, is_allowed: bool) -> None:
    hosts = AllowedHosts.parse(entries)
    if is_allowed:
        hosts.check(parse_url(url))
    else:
        with pytest.raises(InvalidImageUrlError):
            hosts.check(parse_url(url))


@pytest.mark.parametrize(
    "entries", ["a b", "ftp://a.com", "a.*.com", "**", "http://", "a.com/x", "a.com:8080", "0x7f.1"]
)
def test_lists_that_can_not_be_meant(entries: str) -> None:
    with pytest.raises(ConfigError, match="allowed_media_domains"):
        AllowedHosts.parse(entries)


def test_every_answer_must_be_public() -> None:
    good, bad = ipaddress.ip_address("8.8.8.8"), ipaddress.ip_address("10.0.0.1")
    check_addresses([good, good])
    for answers in ([], [bad], [good, bad], [bad, good]):
        with pytest.raises(InvalidImageUrlError):
            check_addresses(answers)
