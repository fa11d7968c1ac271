"""A child of the test's own process, as servers make them that load the application first."""

import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Self

from beatless.outbox.sockets import readable


class ForkedChild:
    """Calls something in a fork of this process. Its answer is JSON; what it raises is told."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._answers, answer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            self.pid = os.fork()
        if not self.pid:
            try:
                told = {"answer": act()}
            except BaseException as error:
                told = {"raised": type(error).__name__, "text": traceback.format_exc()}
            os.write(answer, json.dumps(told).encode() + b"\n")
            os._exit(0)
        os.close(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._answers)

    def told(self, seconds: float = 60.0) -> dict[str, Any]:
        ready = readable([self._answers], seconds)
        assert ready, f"the child says nothing for {seconds} s"
        text = b""
        while not text.endswith(b"\n"):
            part = os.read(self._answers, 65536)
            assert part, "the child ended without a word"
            text += part
        return json.loads(text)

    def answer(self) -> Any:
        told = self.told()
        assert "answer" in told, told["text"]
        return told["answer"]
