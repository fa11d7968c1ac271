"""Everything that can go wrong between a commit and its delivery.

OutboxError
├── SchemaMissing               the tables are not there
├── DirectConnectionRequired    LISTEN does not arrive: a transaction pooler is in the way
├── PublishFailed               Redis or the broker cannot be reached now; try again later
└── PublishRefused              the server answered, and refused this very message
"""


class OutboxError(Exception):
    """Base of this package's errors."""


class SchemaMissing(OutboxError):
    """The tables of this schema do not exist."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        self.schema = schema

    def __str__(self) -> str:
        return f"schema {self.schema!r} has no beatless tables: run `beatless migrate` first"


class DirectConnectionRequired(OutboxError):
    """A NOTIFY sent to ourselves did not come back."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"a NOTIFY to ourselves did not arrive within {self.seconds:g} s: the listen URL goes "
            "through a transaction pooler; set BEATLESS_LISTEN_URL to a direct connection"
        )


class PublishFailed(OutboxError):
    """The server cannot be reached; every message of the batch must be sent again."""

    def __init__(self, server: str, reason: str, is_closed: bool = False) -> None:
        """`is_closed`: the connection was closed or not opened, perhaps over one message."""
        super().__init__(server, reason, is_closed)
        self.server = server
        self.reason = reason
        self.is_closed = is_closed

    def __str__(self) -> str:
        return f"{self.server} cannot be reached: {self.reason}"


class PublishRefused(OutboxError):
    """The server is up and refuses the batch: sending it again will not help."""

    def __init__(self, server: str, reason: str, of_message: bool = False) -> None:
        """`of_message`: it is one message that cannot be sent, and not its queue."""
        super().__init__(server, reason, of_message)
        self.server = server
        self.reason = reason
        self.of_message = of_message

    def __str__(self) -> str:
        return f"{self.server} refuses the message: {self.reason}"
