"""The configuration of Celery is what docs/workers.md says, on both brokers."""

import ast
import re
from pathlib import Path

import pytest

from beatless import Settings
from beatless.worker import celery_settings

TEXT = (Path(__file__).parents[2] / "docs" / "workers.md").read_text()
TABLE = TEXT.partition("## What is set, and why")[2]
NAMED = re.compile(r"`(\w+) = (\w[\w.\"\[\]]*|\[[^]`]*\])`(?: \((Redis|RabbitMQ)\))?")
BROKERS = {"Redis": "redis://127.0.0.1:1/0", "RabbitMQ": "amqp://127.0.0.1:1//"}


@pytest.mark.parametrize("broker", BROKERS)
def test_every_value_that_is_documented_is_set(broker: str) -> None:
    settings = Settings(
        database_url="postgresql://127.0.0.1:1/x",
        redis_url=BROKERS["Redis"],
        broker_url=BROKERS[broker],
    )
    found = celery_settings(settings, [])
    options = found["broker_transport_options"]
    seen = 0
    for cell in re.findall(r"^\| (`.*?) \|", TABLE, re.MULTILINE):
        others = {other for other in BROKERS if other != broker}
        only = set(re.findall(r"\((Redis|RabbitMQ)\)", cell))
        for name, value, where in NAMED.findall(cell):
            # A broker named at the end of a cell is meant for all of it.
            if where in others or (only and not where and only <= others):
                continue
            if name not in found and name not in options:
                assert broker == "RabbitMQ", f"{name} is documented and not set"
                continue  # an option of the Redis transport
            assert (found | options)[name] == ast.literal_eval(value), name
            seen += 1
    assert seen >= 12
