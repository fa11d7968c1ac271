"""Everything that can go wrong for people who use beatless.

JobsError
├── BadSetting          a BEATLESS_* variable is unknown or has a bad value
├── UnknownPlan         no plan of this app has this name
├── BadRequest          an argument is not usable
├── QueueBusy           runs of the queue are running
├── WrongEncoding       the database cannot hold every text
├── SchemaBehind        the database lacks what this version needs
├── SchemaTaken         the schema has something of others under names of ours
├── MigrationBlocked    a table is held by others for so long that it cannot be changed
├── Unreachable         Postgres, Redis, the broker or the API does not answer
├── StatementTimeout    Postgres ended a statement that waited or worked for too long
├── TransactionConflict another transaction was faster, which the caller's cannot see
├── AccessDenied        the API does not know the token, or the token lacks a scope
├── ExtraMissing        packages of an extra are not installed
├── HistoryChanged      the database was restored or failed over: events seen may be gone
└── WaitTimeout         the run did not end in the time given
"""

from collections.abc import Sequence


class JobsError(Exception):
    """Base of this package's errors."""


class BadSetting(JobsError):
    """A setting cannot be used."""

    def __init__(self, name: str, problem: str, example: str) -> None:
        super().__init__(name, problem, example)
        self.name = name
        self.problem = problem
        self.example = example

    def __str__(self) -> str:
        example = f"; for example {self.name}={self.example}" if self.example else ""
        return f"{self.name} {self.problem}{example}"


class UnknownPlan(JobsError):
    """No plan of this app has this name."""

    def __init__(self, plan: str, known: Sequence[str]) -> None:
        super().__init__(plan, known)
        self.plan = plan
        self.known = known

    def __str__(self) -> str:
        known = ", ".join(sorted(self.known)) or "none"
        return f"no plan is called {self.plan!r:.200}; this app has: {known}"


class BadRequest(JobsError):
    """An argument is not usable."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field} {self.problem}"


class QueueBusy(JobsError):
    """Runs of the queue are running."""

    def __init__(self, queue: str, active: int) -> None:
        super().__init__(queue, active)
        self.queue = queue
        self.active = active

    def __str__(self) -> str:
        return (
            f"queue {self.queue} has {self.active} of its runs running: wait for them, cancel "
            "them, or use force, which takes their leases away"
        )


class SchemaBehind(JobsError):
    """The database lacks what this version needs: migrations, or what newer ones have removed."""

    def __init__(self, schema: str, found: str | None, needed: str, given: bool = False) -> None:
        """`found` is the last migration: None if there is none, "" if it was not looked up.

        `given`: seen on a connection of the caller's, which may be of another database.
        """
        super().__init__(schema, found, needed, given)
        self.schema = schema
        self.found = found
        self.needed = needed
        self.given = given

    def __str__(self) -> str:
        found = f"is at migration {self.found or 'none'}, this version needs {self.needed}"
        advice = "run `beatless migrate`"
        if self.found == "":
            found = f"lacks what this version needs: migration {self.needed}"
        elif self.found is not None and self.found > self.needed:
            found = (
                f"is at migration {self.found} and no longer has what this version, of migration "
                f"{self.needed}, needs"
            )
            advice = "update this process"
        return f"schema {self.schema!r} {found}: {advice}" + (
            ", or pass a connection= of the database that has it" if self.given else ""
        )


class WrongEncoding(JobsError):
    """The database is not in UTF8, so that it cannot hold every text."""

    def __init__(self, database: str, encoding: str) -> None:
        super().__init__(database, encoding)
        self.problem = f"the database {database} is in {encoding}, which cannot hold every text"
        self.advice = (
            f"make one in UTF8 (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0), move what "
            f"{database} has with pg_dump, and let BEATLESS_DATABASE_URL name it"
        )

    def __str__(self) -> str:
        return f"{self.problem}: {self.advice}"


class SchemaTaken(JobsError):
    """The schema has something of others under names of ours. Nothing was changed."""

    def __init__(self, schema: str, names: Sequence[str]) -> None:
        super().__init__(schema, names)
        self.schema = schema
        self.names = names

    def __str__(self) -> str:
        return (
            f"schema {self.schema!r} has {', '.join(self.names)}, not made by beatless: let "
            "BEATLESS_SCHEMA name a schema of its own; nothing was changed"
        )


class MigrationBlocked(JobsError):
    """A statement of a migration did not get its lock, however often it was tried."""

    def __init__(self, statement: str, holder: str) -> None:
        super().__init__(statement, holder)
        self.statement = statement
        self.holder = holder

    def __str__(self) -> str:
        return (
            f"{self.statement!r} waits for {self.holder}: end that session or wait for it, and run "
            "`beatless migrate` again; finished revisions are kept"
        )


class Unreachable(JobsError):
    """A server does not answer."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(server, reason)
        self.server = server
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.server} cannot be reached: {self.reason}"


class StatementTimeout(JobsError):
    """A statement waited for a lock, or worked, for longer than it may. Nothing was changed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"Postgres ended the statement, nothing was changed: {self.reason}; another "
            "transaction holds a lock that it needs, or the limit is too short: try again"
        )


class TransactionConflict(JobsError):
    """The caller's transaction lost a race, and Postgres ended it; none of its work is stored.

    Only one that is REPEATABLE READ or SERIALIZABLE: it does not see what others commit after its
    first statement. `sqlstate` is that of a serialization failure, by which callers try again; the
    error of the caller's driver is the `__cause__`.
    """

    sqlstate = "40001"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"another transaction has meanwhile committed what this one cannot see: {self.reason}; "
            "roll back, and try the whole transaction again, or make it READ COMMITTED"
        )


class AccessDenied(JobsError):
    """The API does not know the token, or the token lacks a scope."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"the API refuses ({self.status}): {self.detail}"


class ExtraMissing(JobsError):
    """The call needs packages of an extra that is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(what, package, extra)
        self.what = what
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return (
            f"{self.what} needs the package {self.package}, which is not installed: "
            f"pip install 'beatless[{self.extra}]'"
        )


class HistoryChanged(JobsError):
    """The database was restored or failed over while a run, or all of them, were followed."""

    def __init__(self, run_id: str | None, seq: int) -> None:
        """`run_id` is None for a tail."""
        super().__init__(run_id, seq)
        self.run_id = run_id
        self.seq = seq

    def __str__(self) -> str:
        if self.run_id is None:
            return (
                "the database has another history: events of the tail may be gone, and others not "
                "have come; read the runs and tail them anew, or pass on_reset"
            )
        return (
            f"the database of run {self.run_id} has another history since event {self.seq}: forget "
            "its events and follow it from 0, or pass on_reset"
        )


class WaitTimeout(JobsError):
    """The run did not end in the time given; it goes on all the same."""

    def __init__(self, run_id: str, seconds: float, state: str, last_seq: int) -> None:
        super().__init__(run_id, seconds, state, last_seq)
        self.run_id = run_id
        self.seconds = seconds
        self.state = state
        self.last_seq = last_seq

    def __str__(self) -> str:
        return (
            f"run {self.run_id} did not end within {self.seconds:g} s: "
            f"it is {self.state} at seq {self.last_seq}"
        )
