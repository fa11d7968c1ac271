"""The authorities that clients over HTTP trust."""

import asyncio
import ssl
from pathlib import Path

import pytest

from beatless.http import AsyncClient, Client
from beatless.http.tls import trusted

AUTHORITY = Path(__file__).parents[1] / "certificates" / "ca.pem"


def test_the_clients_of_a_process_read_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    trusted()
    load = ssl.SSLContext.load_verify_locations
    monkeypatch.setattr(
        ssl.SSLContext,
        "load_verify_locations",
        lambda self, *args, **options: (read.append(args), load(self, *args, **options)),
    )

    Client("https://beatless.example").close()
    asyncio.run(AsyncClient("https://beatless.example").aclose())

    assert read == []


def test_a_file_that_the_environment_names_is_read_when_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    of_the_system = trusted()
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))

    assert len(trusted().get_ca_certs()) == 1
    assert trusted() is not of_the_system
    assert trusted().verify_mode is ssl.CERT_REQUIRED
    assert trusted().check_hostname
