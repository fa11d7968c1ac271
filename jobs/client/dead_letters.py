"""Calls about event messages that could not be published."""

from beatless.client.base import BaseClient
from beatless.client.requests import check_texts
from beatless.errors import BadRequest
from beatless.outbox.letters import DeadLetter


class DeadLetterCalls(BaseClient):
    """Dead letters."""

    def dead_letters(self, limit: int = 100, after: int = 0) -> list[DeadLetter]:
        """Event messages that could not be published, oldest first, with an id above `after`.

        See `failed_runs` for runs.

        >>> client.dead_letters(limit=10)
        []
        """
        return self._in_transaction(
            None, lambda caller: self._letters.list(caller, limit=limit, after=after)
        )

    def dead_letter(self, letter_id: int) -> DeadLetter:
        """One of `dead_letters`. Raises BadRequest if there is no such letter.

        >>> letter = client.dead_letter(7)
        Traceback (most recent call last):
            ...
        beatless.errors.BadRequest: dead letter 7 does not exist
        """
        found = self.dead_letters(limit=1, after=letter_id - 1)
        if not found or found[0].id != letter_id:
            raise BadRequest("dead letter", f"{letter_id} does not exist")
        return found[0]

    def requeue_dead_letter(self, letter_id: int) -> None:
        """Publish the message again. Raises BadRequest if there is no such letter.

        >>> for letter in client.dead_letters():
        ...     client.requeue_dead_letter(letter.id)
        """
        if not self._in_transaction(None, lambda caller: self._letters.requeue(caller, letter_id)):
            raise BadRequest("dead letter", f"{letter_id} does not exist")

    def requeue_dead_letters(self, *, reason: str = "", limit: int = 1000) -> int:
        """Publish many messages again, oldest first; how many they were.

        Those that have `reason` in their reason, ignoring case.

        >>> client.requeue_dead_letters(reason="too large")
        0
        """
        check_texts(reason=reason)
        return self._in_transaction(
            None,
            lambda caller: self._letters.requeue_some(caller, reason=reason, limit=limit),
        )

    def discard_dead_letter(self, letter_id: int) -> None:
        """Forget the message; its events stay in the journal. Raises BadRequest.

        >>> for letter in client.dead_letters():
        ...     client.discard_dead_letter(letter.id)
        """
        if not self._in_transaction(None, lambda caller: self._letters.discard(caller, letter_id)):
            raise BadRequest("dead letter", f"{letter_id} does not exist")
