"""What a Redis URL means, to redis-py and to kombu."""

import ssl

import pytest
from kombu import Connection

from beatless import BadSetting, Settings
from beatless.redis_urls import RedisUrl
from beatless.settings import redact
from tests.valkeys import CERTIFICATES

CA = CERTIFICATES / "ca.pem"
SENTINELS = "sentinel://me:se%40cret@one:26379/3;sentinel://two?master_name=main"


def test_one_server():
    url = RedisUrl.parse("redis://me:se%40cret@cache:6380/2")
    assert (url.hosts, url.username, url.password, url.db) == (
        (("cache", 6380),),
        "me",
        "se@cret",
        2,
    )
    assert url.broker()["broker_url"] == "redis://me:se%40cret@cache:6380/2"
    assert "se@cret" not in repr(url)


def test_sentinels():
    url = RedisUrl.parse(f"{SENTINELS}&sentinel_password=theirs")
    assert url.hosts == (("one", 26379), ("two", 26379))
    assert (url.username, url.password, url.db, url.master) == ("me", "se@cret", 3, "main")

    broker = url.broker()
    connection = Connection(
        broker["broker_url"], transport_options=broker["broker_transport_options"]
    )
    assert connection.alt == [
        "sentinel://me:se%40cret@one:26379/3",
        "sentinel://me:se%40cret@two:26379/3",
    ]
    assert connection.transport_options["master_name"] == "main"
    assert connection.transport_options["sentinel_kwargs"]["password"] == "theirs"
    assert "theirs" not in repr(url)


def test_certificates_are_checked_unless_the_url_says_otherwise():
    plain = RedisUrl.parse("rediss://cache").broker()["broker_use_ssl"]
    assert plain == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}

    careless = RedisUrl.parse("rediss://cache?ssl_cert_reqs=none").broker()["broker_use_ssl"]
    assert careless == {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}


def test_tls_to_sentinels_and_to_what_they_name():
    url = RedisUrl.parse(f"{SENTINELS}&ssl_ca_certs={CA}")
    broker = url.broker()
    assert broker["broker_use_ssl"]["ssl_ca_certs"] == str(CA)
    assert broker["broker_transport_options"]["sentinel_kwargs"]["ssl_ca_certs"] == str(CA)
    assert broker["broker_transport_options"]["sentinel_kwargs"]["ssl"] is True
    assert RedisUrl.parse(f"{SENTINELS}&ssl=true").tls is not None
    assert RedisUrl.parse(SENTINELS).tls is None


def test_a_socket():
    url = RedisUrl.parse("unix:///run/redis.sock?db=4")
    assert (url.path, url.db) == ("/run/redis.sock", 4)
    assert url.broker()["broker_url"] == "redis+socket:///run/redis.sock?virtual_host=4"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("sentinel://one:26379", "names no master: add ?master_name=NAME"),
        ("redis://one;redis://two", "names several servers, which only a sentinel:// URL may"),
        ("redis://one;sentinel://two", "is not a redis://, rediss://, unix:// or sentinel:// URL"),
        ("redis://one?ssl_ca_certs=/ca", "has the option ssl_ca_certs without TLS"),
        ("rediss://one?ssl_ca_certs=/no/such", "names /no/such as ssl_ca_certs, which cannot be"),
        ("rediss://one?ssl_cert_reqs=maybe", "has ssl_cert_reqs=maybe; choose none, optional or"),
        ("rediss://one?ssl_cacerts=/ca", "has the option ssl_cacerts, which is none of"),
        ("redis://one/zero", "names the database 'zero', which is not a number"),
        ("redis://one:port", "has a bad port"),
    ],
)
@pytest.mark.parametrize("setting", ["redis_url", "broker_url"])
def test_a_url_that_cannot_work_is_refused_with_the_name_of_its_setting(setting, url, problem):
    urls = {"redis_url": "redis://cache", "broker_url": "amqp://rabbit", setting: url}
    with pytest.raises(BadSetting) as raised:
        Settings(database_url="postgresql://db/app", **urls)
    assert str(raised.value).startswith(f"BEATLESS_{setting.upper()} {problem}")


def test_no_password_of_any_part_is_shown():
    shown = redact(f"{SENTINELS};sentinel://you:secret@three&sentinel_password=theirs")
    assert "se%40cret" not in shown
    assert "secret@" not in shown
    assert "theirs" not in shown
    assert "one:26379" in shown
