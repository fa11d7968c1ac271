"""Loopback names and addresses: the one place that recognises and writes them."""

import ipaddress
import socket

NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""The names of this machine in a URL, without brackets."""


def is_address(address: str) -> bool:
    """Whether an address, as a socket reports it, is on loopback."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def is_host(host: str) -> bool:
    """Whether only this machine can reach a server on this host."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(is_address(address) for address in found)


def url(host: str, port: int) -> str:
    """The URL of an HTTP server, as a browser accepts it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
