"""The in-process client: what people do with runs."""

from beatless.client.client import (
    Client,
    RunPage,
    RunRequest,
    beyond_the_head,
    check_cursor,
    new_run_id,
    reaching_postgres,
)

__all__ = [
    "Client",
    "RunPage",
    "RunRequest",
    "beyond_the_head",
    "check_cursor",
    "new_run_id",
    "reaching_postgres",
]
