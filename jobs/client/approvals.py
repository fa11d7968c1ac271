"""Calls by which people decide the approvals of runs."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from beatless.approval_links import ApprovalLink, FoundLink, LinkState
from beatless.client.pages import ApprovalPage, line_of
from beatless.client.requests import check_texts, seconds
from beatless.client.signals import SignalCalls, new_signal_key
from beatless.errors import BadRequest
from beatless.orchestrator.errors import (
    AlreadyDecided,
    ApprovalNotOpen,
    RunEnded,
    SignalConflict,
)
from beatless.orchestrator.events import encode, storable
from beatless.orchestrator.forms import DECISION, find_form
from beatless.orchestrator.open_waits import OpenWait, exact_name, named_occurrence
from beatless.orchestrator.options import problem_with_key, problem_with_text
from beatless.orchestrator.outcomes import STEP_NAME
from beatless.orchestrator.plan import occurrence, step_of
from beatless.orchestrator.records import NewDecision, Place, Run, SentDecision
from beatless.orchestrator.state import RunState
from beatless.orchestrator.waits import WaitKind
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller, execute_lazily

logger = logging.getLogger("beatless.client")

PERSON_CHARACTERS = 200
LINK_S = 7 * 86_400.0
"""How long a link is good."""


class ApprovalCalls(SignalCalls):
    """Decisions of approvals, and links by which they are made."""

    def approve_run(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        by: str,
        key: str | None = None,
        connection: Caller | None = None,
    ) -> SentDecision:
        """Decide an approval for which a run waits now, whether the decision is yes or no.

        `name` is an occurrence (`refund#1`, `refund#2`, `OpenWait.exact`); `refund` means whichever
        is open, in a loop perhaps a question that nobody has read yet. `data` is of the type of its
        form, or JSON; `by` is the person, which is stored in the journal. `key` names the decision,
        as that of a signal: again with the same content it decides nothing. The decision is made if
        and when the transaction commits; `connection` is as for `signal_run`. Of two decisions one
        counts, and the other is told: a transaction that decides as well waits for the first.

        Raises BadPayload (naming the member that the form refuses), AlreadyDecided,
        ApprovalNotOpen, SignalConflict (key used with other content), RunNotFound, RunEnded and
        BadRequest.

        >>> run = beatless.start_run("complaint")
        >>> executed = beatless.work_until_idle()
        >>> yes = {"approved": True}
        >>> sent = client.approve_run(run.run_id, "Refund", yes, by="ann@example.com")
        >>> sent.new
        True
        """
        return self._decide(run_id, name, data, by=by, link=None, key=key, connection=connection)

    async def aapprove_run(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        by: str,
        key: str | None = None,
        connection: AsyncCaller | None = None,
    ) -> SentDecision:
        """`approve_run` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection,
            lambda given: self.approve_run(run_id, name, data, by=by, key=key, connection=given),
        )

    def approval_link(
        self,
        run_id: str,
        name: str,
        *,
        by: str,
        expires_in: float | timedelta = LINK_S,
        connection: Caller | None = None,
    ) -> ApprovalLink:
        """A link by which one person decides one approval of a run, once, without a token.

        It is bound to the run, to the occurrence of the wait and to `by`. The approval need not be
        open yet: a step may send the link before the run comes to it. Without a number (`refund`)
        it is bound to the occurrence that is open, else to the next one. `expires_in` is seconds or
        a timedelta. To open it shows the form; only sending that decides.

        Raises RunNotFound, RunEnded and BadRequest.

        >>> run = beatless.start_run("complaint")
        >>> executed = beatless.work_until_idle()
        >>> link = client.approval_link(run.run_id, "Refund", by="ann@example.com")
        >>> link.occurrence
        'Refund'
        """
        return self._make_link(
            run_id, name, by=by, expires_in=expires_in, maker=None, connection=connection
        )

    def approval_link_of(
        self,
        maker: str | None,
        run_id: str,
        name: str,
        *,
        by: str,
        expires_in: float | timedelta,
    ) -> ApprovalLink:
        """For a server: `approval_link` by this token, no longer than which it is good."""
        return self._make_link(
            run_id, name, by=by, expires_in=expires_in, maker=maker, connection=None
        )

    def _make_link(
        self,
        run_id: str,
        name: str,
        *,
        by: str,
        expires_in: float | timedelta,
        maker: str | None,
        connection: Caller | None,
    ) -> ApprovalLink:
        _check_name(name)
        _check_person(by)
        good_for = seconds("expires_in", expires_in)

        def create(caller: Caller) -> ApprovalLink:
            run = self._get(caller, run_id)
            if run.state.final:
                raise RunEnded(run_id)
            found = self._approval(caller, run, name)
            bound = named_occurrence(name) if found is None else found.occurrence
            if found is None and name == step_of(name):
                bound = occurrence(name, self._inbox.begun(caller, run.run_id, name) + 1)
            return self._links.create(
                caller, run.run_id, bound, by=by, seconds=good_for or 0.0, maker=maker
            )

        return self._in_transaction(connection, create)

    async def aapproval_link(
        self,
        run_id: str,
        name: str,
        *,
        by: str,
        expires_in: float | timedelta = LINK_S,
        connection: AsyncCaller | None = None,
    ) -> ApprovalLink:
        """`approval_link` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection,
            lambda given: self.approval_link(
                run_id, name, by=by, expires_in=expires_in, connection=given
            ),
        )

    def revoke_approval_link(self, link_id: str, *, connection: Caller | None = None) -> None:
        """Let a link decide nothing any more. Raises BadRequest if there is no such link.

        >>> run = beatless.start_run("complaint")
        >>> executed = beatless.work_until_idle()
        >>> link = client.approval_link(run.run_id, "Refund", by="ann@example.com")
        >>> client.revoke_approval_link(link.id)
        """
        if not storable(link_id):
            raise BadRequest("link", f"{link_id!r:.200} does not exist")
        if not self._in_transaction(
            connection,
            lambda caller: self._links.revoke(caller, link_id, namespace=self._namespace),
        ):
            raise BadRequest("link", f"{link_id!r:.200} does not exist")

    async def arevoke_approval_link(
        self, link_id: str, *, connection: AsyncCaller | None = None
    ) -> None:
        """`revoke_approval_link` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.revoke_approval_link(link_id, connection=given)
        )

    def page_of_approvals(
        self,
        *,
        plan: str | None,
        queue: str | None,
        before: Place | None,
        limit: int,
        max_bytes: int,
    ) -> ApprovalPage:
        """For a server: the open approvals among so many runs that wait, newest first.

        Ends after so many bytes, of the runs that were read or of their approvals.
        """
        check_texts(plan=plan, queue=queue)

        def read(caller: Caller) -> ApprovalPage:
            runs = self._journal.list_runs(
                caller,
                namespace=self._namespace,
                state=RunState.WAITING.value,
                plan=plan,
                queue=queue,
                before=before,
                limit=limit,
                read=execute_lazily,
            )
            found, following = _waiting_of(runs, limit, max_bytes)
            lines: list[str] = []
            size, last = 0, ""
            for run_id, opened in self._inbox.open_approvals(caller, list(found)):
                if size >= max_bytes and run_id != last:
                    return ApprovalPage(lines=lines, next=found[last].place)
                waiting, last = found[run_id], run_id
                of_run = {"run_id": run_id, "plan": waiting.plan, "queue": waiting.queue}
                lines.append(line_of(of_run | opened.to_dict()))
                size += len(lines[-1].encode())
            return ApprovalPage(lines=lines, next=following)

        return self._in_transaction(None, read)

    def link_of(self, token: str) -> tuple[FoundLink, OpenWait | None] | None:
        """For a server: the link of this token and its wait, if that is open. Of any namespace."""

        def look(caller: Caller) -> tuple[FoundLink, OpenWait | None] | None:
            found = self._links.find(caller, token)
            if found is None or found.state is not LinkState.OPEN:
                return None if found is None else (found, None)
            waits = self._inbox.open_waits(caller, found.run_id)
            named = [each for each in waits if each.occurrence == found.occurrence]
            return found, next((e for e in named if e.kind is WaitKind.APPROVAL), None)

        return self._in_transaction(None, look)

    def decide_by_link(self, link: FoundLink, data: Any) -> SentDecision:
        """For a server: `approve_run` by a link whose state is open."""
        name = exact_name(link.occurrence)
        return self._decide(
            link.run_id, name, data, by=link.by, link=link.id, key=None, connection=None
        )

    def _decide(
        self,
        run_id: str,
        name: str,
        data: Any,
        *,
        by: str,
        link: str | None,
        key: str | None,
        connection: Caller | None,
    ) -> SentDecision:
        _check_name(name)
        _check_person(by)
        if key is not None and (problem := problem_with_key(key)):
            raise BadRequest("key", problem)
        # A random one, so that a statement whose answer was lost can be sent again.
        own_key = new_signal_key() if key is None else key

        def decide(caller: Caller) -> SentDecision:
            run = self._get(caller, run_id)
            made = _Made(run=run, name=name, data=data, by=by, link=link, key=own_key)
            again = self._tried_before(caller, made)
            if again is not None:
                return again
            opened = self._approval(caller, run, name)
            if opened is not None:
                text = self._checked_data(run, opened.occurrence, opened.form, data)
                new = made.of(opened.occurrence, text)
                sent = self._inbox.decide(caller, new, namespace=self._namespace)
                # Else another try of the same call may have been first.
                sent = sent or self._tried_before(caller, made)
                if sent is not None:
                    return sent
            else:
                new = made.of(named_occurrence(name), self._json_of(data))
            return self._decided_before(caller, made, new)

        sent = self._in_transaction(connection, decide, each_statement=True)
        if connection is None:
            logger.info(
                "approval decided",
                extra={
                    "action": "approval_decided",
                    "run_id": sent.run_id,
                    "wait": sent.occurrence,
                    "by": sent.by,
                    "new": sent.new,
                },
            )
        return sent

    def _tried_before(self, caller: Caller, made: "_Made") -> SentDecision | None:
        """The decision with this key, which was sent before. Raises SignalConflict for another."""
        run = made.run
        used = self._inbox.sent_with(caller, run.run_id, made.key)
        if used is None:
            return None
        occurrence, form = used
        if occurrence is None or not _names(made.name, occurrence):
            raise SignalConflict(run.run_id, made.key)
        new = made.of(occurrence, self._checked_data(run, occurrence, form, made.data))
        found = self._inbox.decision(caller, run.run_id, occurrence, new.data, exact=True)
        if found is None or not found[-1] or found[1:3] != (new.by, new.link):
            raise SignalConflict(run.run_id, made.key)
        return new.sent(found[3], new=False)

    def _decided_before(self, caller: Caller, made: "_Made", new: NewDecision) -> SentDecision:
        """The same decision, which was sent before. Raises why there can be none."""
        run, exact = made.run, made.name != step_of(made.name)
        name = new.occurrence if exact else made.name
        found = self._inbox.decision(caller, run.run_id, name, new.data, exact=exact)
        if found is None:
            if run.state.final:
                raise RunEnded(run.run_id)
            opened = self._approvals(caller, run)
            raise ApprovalNotOpen(run.run_id, made.name, [each.occurrence for each in opened])
        decided, by, link, at, same = found
        if same and (by, link) == (new.by, new.link):
            return SentDecision(run_id=run.run_id, occurrence=decided, by=by, at=at, new=False)
        raise AlreadyDecided(run.run_id, decided, by, at.isoformat())

    def _approvals(self, caller: Caller, run: Run) -> Sequence[OpenWait]:
        """The approvals that are open, oldest first."""
        if run.state.final or run.cancel_requested_at is not None:
            return []
        found = self._inbox.open_waits(caller, run.run_id)
        return [each for each in found if each.kind is WaitKind.APPROVAL]

    def _approval(self, caller: Caller, run: Run, name: str) -> OpenWait | None:
        """The oldest open one that is called so."""
        opened = self._approvals(caller, run)
        named = [each for each in opened if _names(name, each.occurrence)]
        return named[0] if named else None

    def _checked_data(self, run: Run, occurrence: str, given: str | None, data: Any) -> str:
        """The decision as JSON, of the type of the form. Raises BadPayload and BadRequest."""
        plan = self._plans.get(run.plan)
        reference = given or ""
        form = find_form(reference) if plan is None else plan.form(occurrence, reference)
        if form is None:
            raise BadRequest(
                "form",
                f"of approval {occurrence} is {reference}, a type that this process has not "
                f"loaded: decide where plan {run.plan} is, and declare it at the top of a module",
            )
        return self._json_of(form.type.dump(data))

    def _json_of(self, data: Any) -> str:
        return encode(data, where=DECISION, limit=self._journal.max_event_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A decision as its caller has made it: of which occurrence is not known yet."""

    run: Run
    name: str
    data: Any
    by: str
    link: str | None
    key: str

    def of(self, occurrence: str, data: str) -> NewDecision:
        """Of this occurrence, with its data as JSON."""
        return NewDecision(
            run_id=self.run.run_id,
            occurrence=occurrence,
            data=data,
            by=self.by,
            link=self.link,
            key=self.key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A run that waits, without what it has been given."""

    plan: str
    queue: str
    place: Place


def _waiting_of(
    runs: Iterable[Run], limit: int, max_bytes: int
) -> tuple[dict[str, _Waiting], Place | None]:
    """The first `limit` runs, or as many as reach `max_bytes`; the last place if there are more."""
    found: dict[str, _Waiting] = {}
    size = 0
    for run in runs:
        place = (run.created_at, run.run_id)
        found[run.run_id] = _Waiting(plan=run.plan, queue=run.queue, place=place)
        size += len(line_of(run.to_dict()).encode())
        if size >= max_bytes or len(found) == limit:
            return found, place
    return found, None


def _names(name: str, occurrence: str) -> bool:
    """Whether a name means this occurrence: exactly, or as one of those that are called so."""
    return name in (exact_name(occurrence), step_of(occurrence))


def _check_name(name: str) -> None:
    """Raises BadRequest for text that is the name of no occurrence."""
    base, _, visit = name.partition("#") if isinstance(name, str) else ("", "", "")
    if not STEP_NAME.fullmatch(base) or len(name) > PERSON_CHARACTERS or not storable(visit):
        raise BadRequest("name", f"is {name!r:.200}, which no approval can be called")


def _check_person(by: str) -> None:
    """Raises BadRequest."""
    if problem := problem_with_text(by, PERSON_CHARACTERS):
        raise BadRequest("by", f"{problem}: give it the person who decides, as ann@example.com")
