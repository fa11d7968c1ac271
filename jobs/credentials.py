"""Passwords that expire: asked for at each connect, of a function or of a command."""

import shlex
import subprocess
from collections.abc import Callable

Password = Callable[[], str]
"""Gives the password that is good now."""

COMMAND_TIMEOUT_S = 10.0


class PasswordUnavailable(Exception):
    """The password could not be had. To the caller, the server is unreachable."""


def from_command(command: str) -> Password:
    """The first line that the command prints. It is run without a shell."""
    words = shlex.split(command)

    def ask() -> str:
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
            )
        except subprocess.CalledProcessError as error:
            said = str(error.stderr).strip().splitlines()[-1:]
            reason = ": ".join([f"{words[0]} ended with status {error.returncode}", *said])
            raise PasswordUnavailable(reason) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PasswordUnavailable(f"{words[0]} could not be run: {error}") from error
        password = done.stdout.partition("\n")[0].rstrip("\r")
        if not password:
            raise PasswordUnavailable(f"{words[0]} printed nothing")
        return password

    return ask


def ask(password: Password, failure: Callable[[str], Exception]) -> str:
    """The password; or, for any failure of its source, the error of a lost server."""
    try:
        return password()
    except Exception as error:
        reason = f"its password could not be had: {str(error) or type(error).__name__}"
        raise failure(reason) from error
