"""Settings: what the environment may say, and how a refusal reads."""

import dataclasses
from urllib.parse import quote

import pytest
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict

from beatless import BadSetting, Settings
from beatless.settings import engine_url, libpq_url, redact

MINIMAL = {
    "BEATLESS_DATABASE_URL": "postgresql://me:secret@db/app",
    "BEATLESS_REDIS_URL": "redis://:secret@cache:6379/0",
}


def test_two_settings_are_enough():
    settings = Settings.from_env(MINIMAL)
    assert settings.listen_url == settings.database_url
    assert settings.broker_url == settings.redis_url
    assert (settings.schema, settings.prefix) == ("beatless", "beatless")
    assert not settings.pooled


def test_keyword_arguments_win_over_the_environment():
    assert Settings.from_env(MINIMAL | {"BEATLESS_SCHEMA": "a"}, schema="b").schema == "b"


def test_an_empty_variable_is_as_good_as_none():
    assert Settings.from_env(MINIMAL | {"BEATLESS_LEASE_SECONDS": ""}).lease_seconds == 30


@pytest.mark.parametrize("given", ["postgresql://db/app", ["BEATLESS_SCHEMA=x"], Settings])
def test_an_environment_that_is_no_mapping_is_refused(given):
    with pytest.raises(TypeError, match=r"environ is (str|list|type): give a mapping of names"):
        Settings.from_env(given)


def test_variables_of_others_are_not_ours():
    assert Settings.from_env(MINIMAL | {"PATH": "/", "BEATLESS_TOKEN": "t"})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("BEATLESS_DATABASE_URL", "", "is not set; for example BEATLESS_DATABASE_URL=postgresql:"),
        ("BEATLESS_REDIS_URL", "", "is not set; for example BEATLESS_REDIS_URL=redis:"),
        ("BEATLESS_DATABASE_URL", "mysql://db/app", "starts with mysql://, not with postgresql://"),
        ("BEATLESS_DATABASE_URL", "postgresql+psycopg2://db/app", "is psycopg 3, not psycopg2"),
        ("BEATLESS_DATABASE_URL", "nonsense", "is not a URL"),
        ("BEATLESS_LISTEN_URL", "postgresql+asyncpg://db/app", "not with postgresql://"),
        ("BEATLESS_REDIS_URL", "http://cache", "is not a redis://"),
        ("BEATLESS_SCHEMA", "Beatless", "is 'Beatless', which does not match"),
        ("BEATLESS_SCHEMA", "a" * 32, "does not match"),
        ("BEATLESS_SCHEMA", 'a"; DROP TABLE runs', "does not match"),
        ("BEATLESS_SCHEMA", "a\n", "does not match"),
        ("BEATLESS_PREFIX", "a:b", "does not match"),
        ("BEATLESS_LEASE_SECONDS", "soon", "is 'soon', which is not a number"),
        ("BEATLESS_LEASE_SECONDS", "0", "which is not a number above 0"),
        ("BEATLESS_LEASE_SECONDS", "nan", "which is not a number above 0"),
        ("BEATLESS_LEASE_SECONDS", "inf", "which is not a number above 0"),
        ("BEATLESS_MAX_EVENT_BYTES", "1.5", "which is not a number"),
        ("BEATLESS_MAX_EVENT_BYTES", "199", "is 199, below 200: our own events need that"),
        ("BEATLESS_RETENTION_DAYS", "-1", "which is not a number of days; 0 is for ever"),
        ("BEATLESS_RUN_RETENTION_DAYS", "nan", "which is not a number of days; 0 is for ever"),
        ("BEATLESS_DATABASE_URL", "postgresql://u:p@ss@h/db", "that of a user or password as %40"),
        ("BEATLESS_DATABASE_URL", "postgresql://u:p@h:x/db", "has a port that is not a number"),
        ("BEATLESS_DATABASE_URL", "postgresql://h/db?prepare=0", 'query parameter: "prepare"'),
        ("BEATLESS_REDIS_URL", "redis://:se#cret@h/0", "write them as %2F, %3F and %23"),
        ("BEATLESS_REDIS_URL", "redis://:se/cret@h/0", "write them as %2F, %3F and %23"),
        ("BEATLESS_REDIS_URL", "redis://:se?cret@h/0", "write them as %2F, %3F and %23"),
        ("BEATLESS_FAULT", "nowhere", "no crash point 'nowhere': choose one of beside.before"),
        ("BEATLESS_FAULT", "step.before:explode", "no crash action 'explode'"),
        ("BEATLESS_FAULT", "step.before@often", "is wrong"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_its_problem_and_an_example(name, value, problem):
    with pytest.raises(BadSetting) as raised:
        Settings.from_env(MINIMAL | {name: value})
    assert str(raised.value).startswith(name)
    assert problem in str(raised.value)
    assert f"for example {name}=" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("BEATLESS_DATABSE_URL", "remove it, or did you mean BEATLESS_DATABASE_URL?"),
        ("BEATLESS_LEASE_SECOND", "remove it, or did you mean BEATLESS_LEASE_SECONDS?"),
        ("BEATLESS_TOKENS", "remove it, or did you mean BEATLESS_TOKEN?"),
        ("BEATLESS_COLOUR", "remove it"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_name_that_was_meant(name, advice):
    with pytest.raises(BadSetting) as raised:
        Settings.from_env(MINIMAL | {name: "x"})
    assert str(raised.value) == f"{name} is not a setting of beatless; {advice}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("databse_url", "Settings have no databse_url: did you mean database_url?"),
        ("colour", "Settings have no colour"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_one_that_was_meant(name, told):
    with pytest.raises(TypeError) as raised:
        Settings.from_env({}, **{name: "x"})
    assert str(raised.value) == told


def test_what_goes_to_another_process_comes_back_the_same():
    settings = Settings.from_env(
        MINIMAL
        | {
            "BEATLESS_LISTEN_URL": "postgresql://direct/app",
            "BEATLESS_LEASE_SECONDS": "2.5",
            "BEATLESS_FAULT": "step.before@2:kill",
            "BEATLESS_MAX_EVENT_BYTES": "1000",
        }
    )
    assert settings.pooled
    assert Settings.from_env(settings.to_env()) == settings
    assert Settings.from_env({}, **dataclasses.asdict(settings)) == settings


def test_passwords_are_never_shown():
    settings = Settings.from_env(MINIMAL)
    assert "secret" not in repr(settings)
    assert redact("amqp://me:secret@rabbit//") == "amqp://me:***@rabbit//"
    assert redact("redis://:se@cret@redis/0") == "redis://:***@redis/0"
    query = "postgresql://db/app?user=me&password=secret&sslpassword=secret&connect_timeout=5"
    assert redact(query) == query.replace("secret", "***")
    assert redact(5) == 5


def test_a_directory_of_sockets_is_one_in_either_spelling():
    for directory in ("%2Frun%2Fpostgresql", "%2frun%2fpostgresql"):
        url = f"postgresql://me:s%40cret@{directory}:5433/app?sslmode=disable"
        assert Settings.from_env(MINIMAL | {"BEATLESS_DATABASE_URL": url}).database_url == url
        dialect = sqlalchemy.create_engine(engine_url(url)).dialect
        _, options = dialect.create_connect_args(engine_url(url))
        assert options.pop("context", None) is not None
        assert options == conninfo_to_dict(libpq_url(url)) | {"port": 5433}


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_both_drivers_get_a_url_that_they_understand(scheme):
    url = f"{scheme}://me:s%40cret@db:5433/app?sslmode=require"
    assert engine_url(url).drivername == "postgresql+psycopg"
    assert libpq_url(url) == "postgresql://me:s%40cret@db:5433/app?sslmode=require"


def test_files_of_urls_are_found_from_any_directory(tmp_path, monkeypatch):
    """A step may change the directory of its process, which opens connections later too."""
    (here := tmp_path / "here").mkdir()
    for file in (here / "ca.pem", tmp_path / "k.pem", here / "c.pem"):
        file.touch()
    monkeypatch.chdir(here)
    settings = Settings(
        database_url="postgresql://db/app?sslmode=verify-full&sslrootcert=a%20b/ca.pem&sslkey=/k.pem",
        listen_url="postgresql://direct/app?sslrootcert=system&passfile=pass",
        redis_url="rediss://cache/0?ssl_ca_certs=ca.pem&ssl_keyfile=../k.pem",
        broker_url="sentinel://a;sentinel://b?master_name=m&ssl_certfile=c.pem",
    )
    monkeypatch.chdir("/")
    database, listen = map(conninfo_to_dict, (settings.database_url, settings.listen_url))
    assert (database["sslrootcert"], database["sslkey"]) == (f"{here}/a b/ca.pem", "/k.pem")
    assert (listen["sslrootcert"], listen["passfile"]) == ("system", f"{here}/pass")
    folder = quote(str(here))
    assert f"ssl_ca_certs={folder}/ca.pem" in settings.redis_url
    assert f"ssl_keyfile={folder}/../k.pem" in settings.redis_url
    assert settings.broker_url.endswith(f"ssl_certfile={folder}/c.pem")
    assert dataclasses.replace(settings) == settings


def test_spaces_of_a_database_url_reach_libpq():
    """As in options, of which there may be several."""
    url = "postgresql://me:a%20b+c@db/the%20app?options=-c%20geqo%3Doff%20-c%20jit%3Doff"
    assert conninfo_to_dict(libpq_url(url)) == {
        "user": "me",
        "password": "a b+c",
        "host": "db",
        "dbname": "the app",
        "options": "-c geqo=off -c jit=off",
    }


def kubernetes_links(service: str) -> dict[str, str]:
    """What a kubelet tells of a Service: https://kubernetes.io/docs/tutorials/services/."""
    return {
        f"{service}_SERVICE_HOST": "10.96.12.7",
        f"{service}_SERVICE_PORT": "80",
        f"{service}_SERVICE_PORT_HTTP": "80",
        f"{service}_PORT": "tcp://10.96.12.7:80",
        f"{service}_PORT_80_TCP": "tcp://10.96.12.7:80",
        f"{service}_PORT_80_TCP_PROTO": "tcp",
        f"{service}_PORT_80_TCP_PORT": "80",
        f"{service}_PORT_80_TCP_ADDR": "fd00:10:96::7",
        f"{service}_PORT_53_UDP": "udp://[fd00:10:96::7]:53",
    }


def docker_links(alias: str) -> dict[str, str]:
    return {
        f"{alias}_NAME": "/web/cache",
        f"{alias}_PORT": "tcp://172.17.0.5:6379",
        f"{alias}_PORT_6379_TCP": "tcp://172.17.0.5:6379",
        f"{alias}_ENV_REDIS_VERSION": "8.0",
        f"{alias}_ENV_PASSWORD": "two\nlines",
    }


@pytest.mark.parametrize(
    "service",
    ["BEATLESS", "BEATLESS_API", "BEATLESS_APP", "BEATLESS_METRICS", "BEATLESS_REDIS_URL"],
)
@pytest.mark.parametrize("links", [kubernetes_links, docker_links])
def test_links_of_services_are_no_settings(links, service):
    settings = Settings.from_env(MINIMAL | links(service))
    assert settings == Settings.from_env(MINIMAL)


@pytest.mark.parametrize(
    "name",
    [
        "BEATLESS_API_PORT",  # a number is no link
        "BEATLESS_NAME",
        "BEATLESS_API_ENV_X",  # nothing else tells of such a container
        "BEATLESS_SERVICE",
    ],
)
def test_what_only_looks_a_little_like_a_link_is_refused(name):
    with pytest.raises(BadSetting, match="is not a setting of beatless"):
        Settings.from_env(MINIMAL | {name: "8400"})


def test_a_url_setting_is_never_a_link():
    with pytest.raises(BadSetting, match="is not a redis://"):
        Settings.from_env(MINIMAL | {"BEATLESS_REDIS_URL": "tcp://10.96.12.7:6379"})


MANY = "postgresql://me:s%40c@one:5433,[::1]:5434/app"


def test_several_hosts_are_spelled_in_one_way_that_both_drivers_get_in_theirs():
    settings = Settings.from_env(MINIMAL | {"BEATLESS_DATABASE_URL": f"{MANY}?sslmode=require"})
    assert conninfo_to_dict(libpq_url(settings.database_url)) == {
        "user": "me",
        "password": "s@c",
        "host": "one,::1",
        "port": "5433,5434",
        "dbname": "app",
        "sslmode": "require",
        "target_session_attrs": "primary",
    }
    found = engine_url(settings.listen_url)
    assert found.query["host"] == ("one:5433", "[::1]:5434")
    assert (found.host, found.password, found.database) == (None, "s@c", "app")
    assert "s%40c" not in repr(settings)
    chosen = conninfo_to_dict(libpq_url(f"{MANY}?target_session_attrs=read-write"))
    assert chosen["target_session_attrs"] == "read-write"


@pytest.mark.parametrize(
    "query",
    ["host=a:1&host=b:2", "host=a,b&port=1,2", "host=a,b", "host=a:1", "host=a&host=b", "port=1,2"],
)
def test_other_spellings_of_several_hosts_are_refused_with_the_right_one(query):
    with pytest.raises(BadSetting, match=r"write them as postgresql://.*one\.example:5432,two"):
        Settings.from_env(MINIMAL | {"BEATLESS_LISTEN_URL": f"postgresql://me:s@/app?{query}"})


@pytest.mark.parametrize("url", ["postgresql://a:x,b:1/app", "postgresql://a,,b/app"])
def test_a_bad_host_among_several_is_refused(url):
    with pytest.raises(BadSetting, match="which is not host:port"):
        Settings.from_env(MINIMAL | {"BEATLESS_DATABASE_URL": url})


@pytest.mark.parametrize("host", ["/run/postgresql", "db", "::1", "10.0.0.1", "@abstract"])
def test_one_host_or_socket_may_stand_in_the_query(host):
    url = f"postgresql://me@/app?host={host}"
    assert Settings.from_env(MINIMAL | {"BEATLESS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("target", ["standby", "read-only", "prefer-standby"])
def test_a_target_that_cannot_be_written_to_is_refused(target):
    with pytest.raises(BadSetting, match=f"target_session_attrs={target}"):
        Settings.from_env(
            MINIMAL | {"BEATLESS_DATABASE_URL": f"{MANY}?target_session_attrs={target}"}
        )
