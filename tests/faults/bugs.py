"""Known bugs of the kinds that such systems have had, each as edits of this tree."""

from typing import NamedTuple


class Bug(NamedTuple):
    """One edit: the text stands exactly once in the file. Others may belong to it."""

    file: str
    text: str
    instead: str
    more: tuple["Bug", ...] = ()

    @property
    def edits(self) -> tuple["Bug", ...]:
        return (self, *self.more)


SETTLED = """\
-- fragment: settled_state
-- The state after a boundary: one if nobody asked to cancel, another if somebody did.
CASE WHEN r.cancel_requested_at IS NULL THEN b.state ELSE b.state_cancelled END

-- fragment: settled
-- The row of a run `r` after a boundary `b`.
-- Which of two outcomes is decided on the locked row: a cancel is before or after, never between.
last_seq = r.last_seq
  + CASE WHEN r.cancel_requested_at IS NULL THEN b.n ELSE b.n_cancelled END,
state = {settled_state},
result = CASE WHEN r.cancel_requested_at IS NULL THEN b.result::jsonb END,
error = CASE WHEN r.cancel_requested_at IS NULL
             THEN b.error::jsonb ELSE b.error_cancelled::jsonb END,
lease_expires_at = CASE WHEN {settled_state} = 'running' THEN r.lease_expires_at END,
deadline_at = CASE WHEN b.reason <> 'undo' THEN r.deadline_at END,
not_before = CASE WHEN {settled_state} = 'queued'
                  THEN least(CASE WHEN r.cancel_requested_at IS NULL THEN r.deadline_at END,
                    clock_timestamp() + make_interval(secs =>
                      CASE WHEN r.cancel_requested_at IS NULL
                           THEN b.delay ELSE b.delay_cancelled END)) END,
finished_at = CASE WHEN {settled_state} NOT IN ('running', 'queued')
                   THEN clock_timestamp() END

-- fragment: settled_columns
-- The columns of such a row and its boundary that `written_beside` needs.
b.i, b.shard, b.reason, r.run_id, r.last_seq, r.state, r.not_before, r.created_at,
NOT (r.cancel_requested_at IS NULL) AS cancelled,
CASE WHEN r.cancel_requested_at IS NULL THEN b.n ELSE b.n_cancelled END AS n
"""
"""The boundary of a step, up to its row."""

BUGS = {
    "a boundary is written without the lease": Bug(
        "orchestrator/journal.sql",
        "r.lease_token = %(token)s AND r.state = 'running'",
        "%(token)s <> 0 AND r.state = 'running'",
    ),
    "a trace is written without the lease": Bug(
        "orchestrator/journal.sql",
        "run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running' AND last_seq",
        "run_id = %(run_id)s AND %(token)s <> 0 AND state = 'running' AND last_seq",
    ),
    "a claim keeps the token": Bug(
        "orchestrator/lease.sql",
        "2147483646) + 1, lease_token = %(token)s,\n         dead_token = CASE",
        "2147483646) + 1, lease_token = greatest(lease_token, least(%(token)s, 7)),\n"
        "         dead_token = CASE",
    ),
    "a lease is taken from a worker that lives": Bug(
        "orchestrator/lease.sql",
        "state = 'running' AND lease_expires_at < clock_timestamp()",
        "state = 'running' AND lease_expires_at IS NOT NULL",
    ),
    "a process that lives is taken for dead": Bug(
        "orchestrator/death_watch.py",
        "for descriptor in self._lives.keys() & set(ready):",
        "for descriptor in list(self._lives):",
    ),
    "a heartbeat keeps no lease": Bug(
        "orchestrator/lease.sql",
        "lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)\n    FROM held",
        "lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s / 50)\n"
        "    FROM held",
    ),
    "a tick is lost when the relay dies between insert and move": Bug(
        "orchestrator/firing.py",
        '        self._faults.reach("schedule.before")\n',
        "        self._fire(connection, [tick | {'fires': False} for tick in ticks])\n"
        "        ticks = [t | {'version': t['version'] + 1, 'move_s': 0.0} for t in ticks]\n"
        '        self._faults.reach("schedule.before")\n',
    ),
    "a tick fires twice": Bug(
        "orchestrator/firing.py",
        '        self._faults.reach("schedule.before")\n',
        "        here = [t | {'next_tick': t['tick'], 'move_s': 0.0} for t in ticks]\n"
        "        self._fire(connection, here)\n"
        "        ticks = [t | {'version': t['version'] + 1, 'fires': False} for t in ticks]\n"
        '        self._faults.reach("schedule.before")\n',
        (
            Bug(
                "orchestrator/firing.py",
                '"key": tick_key(self.name, tick),',
                '"key": f"{tick_key(self.name, tick)}/{run_id}",',
            ),
        ),
    ),
    "a cancel of a run that runs is not stored": Bug(
        "orchestrator/cancels.sql",
        "AND state IN ('queued', 'running') AND cancel_requested_at IS NULL",
        "AND state IN ('queued') AND cancel_requested_at IS NULL",
    ),
    "a cancel is stored after the end": Bug(
        "orchestrator/cancels.sql",
        "     AND state IN ('queued', 'running') AND cancel_requested_at IS NULL",
        "     AND cancel_requested_at IS NULL",
    ),
    "a claim does not look whether its queue is paused": Bug(
        "orchestrator/lease.sql",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                              WHERE q.name = r.queue AND q.paused_at IS NOT NULL)\n"
        "             AND (limits IS NULL",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                              WHERE q.name = '' AND q.paused_at IS NOT NULL)\n"
        "             AND (limits IS NULL",
    ),
    "a run that waits for a retry is forgotten": Bug(
        "orchestrator/fragments.sql",
        "    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'",
        "    FROM u WHERE d.run_id = u.run_id AND u.state = 'none'",
        (
            Bug(
                "orchestrator/fragments.sql",
                "WHERE d.run_id = u.run_id AND u.state NOT IN ('queued', 'running')",
                "WHERE d.run_id = u.run_id AND u.state <> 'running'",
            ),
        ),
    ),
    "a group writes a boundary under the lease of another run": Bug(
        "orchestrator/group_commit.sql",
        "WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'\n"
        "        AND r.last_seq >= x.after\n"
        "      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r\n), u AS (\n"
        "  UPDATE {schema}.runs r\n     SET last_seq = r.last_seq + b.n, state",
        "WHERE r.run_id = x.run_id AND x.token = ANY(%(tokens)s::bigint[])\n"
        "        AND r.state = 'running'\n"
        "        AND r.last_seq >= x.after\n"
        "      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r\n), u AS (\n"
        "  UPDATE {schema}.runs r\n     SET last_seq = r.last_seq + b.n, state",
    ),
    "a commit of a group whose answer was lost is made again": Bug(
        "orchestrator/group.py",
        "            member.alone, member.in_doubt = True, lost\n",
        "            member.alone, member.in_doubt = True, False\n",
    ),
    "a claim of further runs does not look whether their queue is paused": Bug(
        "orchestrator/lease.sql",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                 WHERE q.name = r.queue AND q.paused_at IS NOT NULL)\n\n",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                 WHERE q.name = '' AND q.paused_at IS NOT NULL)\n\n",
    ),
    "a claim of further runs gives them all one token": Bug(
        "orchestrator/lease.sql",
        "lease_token = (%(tokens)s::bigint[])[found.i],",
        "lease_token = (%(tokens)s::bigint[])[1] * 0 + 7,",
    ),
    "an attempt that was handed back counts": Bug(
        "orchestrator/progress.py",
        "if was_in_flight:\n            self.uncounted()\n",
        "if was_in_flight and name != GIVEN_BACK:\n            self.uncounted()\n",
    ),
    "a delay is shorter than asked for": Bug(
        "orchestrator/fragments.sql",
        "coalesce(not_before, clock_timestamp() + make_interval(secs => delay))",
        "coalesce(not_before, clock_timestamp() + make_interval(secs => delay / 10))",
    ),
    "a start commits by itself": Bug(
        "jobs/client/base.py",
        "            return act(given)\n",
        "            given = None\n",
    ),
    "a run that was taken over begins anew": Bug(
        "orchestrator/execution.py",
        "        if self._lease.begun and not self._lease.unreadable:\n",
        "        if self._lease.begun or self._lease.run.attempt > 1:\n",
    ),
    "a commit whose answer was lost is made again": Bug(
        "orchestrator/sure_writer.py",
        "            if tried:\n",
        "            if tried and self._run_id == '':\n",
    ),
    "a stream does not look for gaps": Bug(
        "jobs/streams/cursor.py",
        "self._early.pop(self.seq + 1, None)",
        "self._early.pop(min(self._early, default=0), None)",
    ),
    "a stream believes events of other runs": Bug(
        "jobs/streams/messages.py",
        "EventText.read(line, run_id)",
        "EventText.read(line)",
    ),
    "a lease has no token": Bug(
        "orchestrator/lease.py", "return secrets.randbits(63)", "return secrets.randbits(0)"
    ),
    "a relay passes by rows that somebody holds": Bug(
        "outbox/queries.sql",
        "AND o.run_id <> ALL(%(aside)s::text[])\n    ORDER BY o.id LIMIT {per_shard}) o\n",
        "AND o.run_id <> ALL(%(aside)s::text[])\n    ORDER BY o.id LIMIT {per_shard}"
        " FOR UPDATE SKIP LOCKED) o\n",
    ),
    "a relay deletes events before it publishes them": Bug(
        "outbox/event_lane.py",
        "        try:\n            self._publisher.publish(messages)\n        except PublishFailed",
        "        self._connection.execute(self._queries.forget_events_sql, _ids(picked))\n"
        "        try:\n            self._publisher.publish(messages)\n        except PublishFailed",
    ),
    "a relay publishes the last events of a run first": Bug(
        "outbox/event_lane.py",
        "row.body for row in group",
        "row.body for row in reversed(group)",
    ),
    "a cancel leaves no message in the outbox": Bug(
        "orchestrator/cancels.sql",
        "         last_seq FROM u\n), gone AS (",
        "         last_seq FROM u WHERE false\n), gone AS (",
    ),
    "a stream reads the journal before it subscribes": Bug(
        "jobs/streams/streams.py",
        "                await mailbox.ready(limit.left)\n",
        "",
        (
            Bug(
                "jobs/streams/hub.py",
                '        self.missed("reconnect" if live else "without_redis")\n',
                '        if not live:\n            self.missed("without_redis")\n',
            ),
        ),
    ),
    "a stream listens to the channel of the history before": Bug(
        "jobs/streams/streams.py",
        "        channel = channel_for(self._prefix, origin_of(epoch), run.run_id)\n",
        "        channel = self._known_channel(run.run_id) or channel_for(\n"
        "            self._prefix, origin_of(epoch), run.run_id\n"
        "        )\n",
    ),
    "a stream does not read the journal after it was cut off": Bug(
        "jobs/streams/hub.py",
        '        self.missed("reconnect" if live else "without_redis")\n',
        '        if not live:\n            self.missed("without_redis")\n',
    ),
    "a bell is released before its writer commits": Bug(
        "outbox/fragments.sql",
        "NOT pg_try_advisory_xact_lock_shared({bell_key}, %(shard)s)",
        "NOT (pg_try_advisory_lock_shared({bell_key}, %(shard)s)"
        " AND pg_advisory_unlock_shared({bell_key}, %(shard)s))",
        (
            Bug(
                "outbox/fragments.sql",
                "NOT pg_try_advisory_xact_lock_shared({bell_key}, shard)",
                "NOT (pg_try_advisory_lock_shared({bell_key}, shard)"
                " AND pg_advisory_unlock_shared({bell_key}, shard))",
            ),
        ),
    ),
    "a start rings the bell of another shard": Bug(
        "outbox/fragments.sql",
        "NOT pg_try_advisory_xact_lock_shared({bell_key}, shard)",
        "NOT pg_try_advisory_xact_lock_shared({bell_key}, (shard + 8) %% 16)",
    ),
    "a relay sleeps without another look": Bug(
        "outbox/session_loop.py",
        "        if self._is_busy(self._drain_all()):\n            self.sessions.rouse()\n"
        "        elif self.sessions.granted():\n"
        "            if self._is_busy(self._drain_all()):\n"
        "                self.sessions.rouse()\n                return\n",
        "        granted = self.sessions.granted()\n"
        "        if not granted and self._is_busy(self._drain_all()):\n"
        "            self.sessions.rouse()\n        elif granted:\n",
    ),
    "the floor does not wait for transactions that run": Bug(
        "outbox/scan_floor.py",
        "self._decided = xmin is not None and xmin[0] >= self._candidate.xid",
        "self._decided = xmin is not None",
    ),
    "the floor rises to the last id that was seen": Bug(
        "outbox/scan_floor.py",
        "        self._rows_since = 0\n        if self._candidate is None:",
        "        self._rows_since, self.id = 0, self._highest\n        if self._candidate is None:",
    ),
    "the floor rises to what was picked since its candidate": Bug(
        "outbox/scan_floor.py",
        "self.id = self._candidate.id",
        "self.id = max(self._candidate.id, self._highest)",
    ),
    "a message that the broker has lost is not missed": Bug(
        "outbox/queries.sql",
        "WHERE d.state <> 'waiting' AND d.due_at <=",
        "WHERE d.state NOT IN ('waiting', 'sent') AND d.due_at <=",
    ),
    "a cancel is read before the row is locked": Bug(
        "orchestrator/journal.sql",
        SETTLED,
        SETTLED.replace(
            "r.cancel_requested_at IS NULL",
            "(SELECT c.cancel_requested_at FROM {schema}.runs c WHERE c.run_id = r.run_id) IS NULL",
        ),
    ),
    "a cancel undoes nothing": Bug(
        "orchestrator/boundaries.py",
        "        if self._plan.on_cancel is not None or self.undoes:\n"
        "            return Boundary(events=events, state=RunState.QUEUED)\n",
        "",
    ),
    "a failure counts twice": Bug(
        "orchestrator/progress.py", "progress.failures += 1", "progress.failures += 2"
    ),
    "a snooze counts as an attempt": Bug(
        "orchestrator/progress.py",
        "if was_in_flight:\n            self.uncounted()\n",
        "if was_in_flight and name != SNOOZED:\n            self.uncounted()\n",
    ),
    "a retry does not wait as long as its step says": Bug(
        "orchestrator/journal.sql",
        "THEN b.delay ELSE b.delay_cancelled",
        "THEN b.delay / 10 ELSE b.delay_cancelled",
    ),
    "a retried run begins at its beginning": Bug(
        "orchestrator/reuse.py",
        "    if progress.compensating:\n        return None\n    if progress.unknown",
        "    if progress.step is not None:\n        return None\n    if progress.unknown",
    ),
    "a deadline is not looked at while a run waits": Bug(
        "orchestrator/deadlines.sql",
        "AND (r.state = 'queued'\n          OR r.state = 'running'",
        "AND (r.state = 'running'",
    ),
    "rows of a step are committed before its result": Bug(
        "orchestrator/executor.py",
        "partial(self._writer.settle_within, settlement=commit.settlement)",
        "lambda within: (within.commit(), self._writer.settle(commit.settlement))[1]",
    ),
    "a commit whose answer was lost is taken for done": Bug(
        "orchestrator/sure_writer.py",
        "if not status.committed_since:\n            return None",
        "if not status.held:\n            return None",
    ),
    "a key is not stored": Bug(
        "orchestrator/fragments.sql",
        "plan_version, queue, 'queued', input, key, 1,",
        "plan_version, queue, 'queued', input, NULL, 1,",
    ),
    "a worker goes on claiming after its grace": Bug(
        "jobs/worker/child_signals.py",
        "    def start(self, worker: Any) -> None:\n",
        "    def start(self, worker: Any) -> None:\n"
        "        for number in LEFT_TO_MAIN_PROCESS:\n"
        "            signal.signal(number, IgnoredSignal(self.terminated))\n",
    ),
    "a cursor has no epoch": Bug(
        "jobs/api/sse.py",
        "if given is not None and (given != epoch or seq > run.last_seq):",
        "if given is not None and seq > run.last_seq:",
    ),
    "a time-out does not look for signals": Bug(
        "orchestrator/execution.py",
        "reply = yield CommitIfQuiet(settlement=conclusion.settlement)",
        "reply = yield from self._settle(conclusion.settlement)",
    ),
    "an inbox is read before the run's row is locked": Bug(
        "orchestrator/inbox.py",
        '            locked = connection.execute(self._sql["lock"], parameters)\n',
        "",
        (
            Bug(
                "orchestrator/inbox.py",
                '            looked = connection.execute(self._sql["look"], parameters)\n',
                '            looked = connection.execute(self._sql["look"], parameters)\n'
                '            locked = connection.execute(self._sql["lock"], parameters)\n',
            ),
        ),
    ),
    "a run is parked in spite of a signal": Bug(
        "orchestrator/leased_writer.py",
        "                if look.events or any(",
        "                if (look.events and not waits) or any(",
    ),
    "a signal to a run whose row is held wakes nobody": Bug(
        "orchestrator/wakes.sql",
        "SELECT place FROM found WHERE ended OR run_id IN (SELECT run_id FROM free)))",
        "SELECT place FROM found))",
    ),
    "a signal wakes nobody": Bug(
        "orchestrator/inbox.sql",
        "(shard, run_id) SELECT DISTINCT shard, run_id FROM good\n",
        "(shard, run_id) SELECT DISTINCT shard, run_id FROM good WHERE false\n",
    ),
    "a time-out wakes nobody": Bug(
        "orchestrator/inbox.sql",
        "SELECT min(to_timestamp((e.data ->> 'until')::float8 / 1000)) FROM",
        "SELECT min('{never}'::timestamptz) FROM",
    ),
    "a time-out comes early": Bug(
        "orchestrator/fragments.sql",
        "(x.data::jsonb ->> 'seconds')::float8) * 1000)",
        "(x.data::jsonb ->> 'seconds')::float8 / 2) * 1000)",
    ),
    "a wait forgets the signals that came before it": Bug(
        "orchestrator/open_waits.py",
        "            case EventType.WAIT_STARTED:\n",
        "            case EventType.WAIT_STARTED:\n                self.signals.clear()\n",
    ),
    "a wait takes the youngest signal": Bug(
        "orchestrator/open_waits.py",
        "for signal in self.signals if signal.name in names",
        "for signal in reversed(self.signals) if signal.name in names",
    ),
    "a wait takes any signal": Bug(
        "orchestrator/open_waits.py",
        "for signal in self.signals if signal.name in names",
        "for signal in self.signals",
    ),
    "a signal ends two waits": Bug(
        "orchestrator/open_waits.py",
        "return self.signals.pop(place)",
        "return signal",
    ),
    "a signal is received as often as it was sent": Bug(
        "orchestrator/inbox.sql",
        "{known} LIMIT 1) k ON true",
        "{known} LIMIT 0) k ON true",
        (
            Bug(
                "orchestrator/inbox.sql",
                "SELECT DISTINCT ON (key, decision ->> 'wait') * FROM gone i\n"
                "     WHERE decision IS NOT NULL OR NOT EXISTS (\n"
                "       SELECT FROM {schema}.run_events e\n"
                "        WHERE e.run_id = i.run_id AND e.type = 'SignalReceived' AND "
                "e.data ->> 'key' = i.key)\n"
                "     ORDER BY key, decision ->> 'wait', id)",
                "SELECT * FROM gone)",
            ),
        ),
    ),
    "signals are lost when a function begins again": Bug(
        "orchestrator/function_boundaries.py",
        "SIGNALS_FROM: min([told + 1, *waiting])",
        "SIGNALS_FROM: told + 1",
    ),
    "a replay calls a body again": Bug(
        "orchestrator/replay.py",
        "            if stored.ended:\n",
        "            if stored.ended and not stored.failures:\n",
    ),
    "a function goes on after a cancel": Bug(
        "orchestrator/function_boundaries.py",
        "return self._unless_cancelled(progress, going_on, [outcome])",
        "return Settlement.ignoring_cancel(going_on)",
    ),
    "a cancel wakes nobody": Bug(
        "orchestrator/cancels.sql",
        "reason = 'cancel'\n    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'",
        "reason = 'cancel'\n    FROM u WHERE d.run_id = u.run_id AND u.state = 'none'",
    ),
    "the end of the last child wakes nobody": Bug(
        "orchestrator/wakes.sql",
        "LIMIT d.children_left + 1) c) <= d.children_left)",
        "LIMIT d.children_left + 1) c) < d.children_left)",
    ),
    "a replay starts children again": Bug(
        "orchestrator/history.py",
        "            call.children = children = Children.from_event(event)\n",
        "            children = Children.from_event(event)\n"
        "            call.children = children if children.run_id else None\n",
    ),
    "children that have not ended take no place": Bug(
        "orchestrator/child_calls.py",
        "room = min(room, children.at_once - look.unfinished)",
        "room = min(room, children.at_once)",
    ),
    "a cancel does not go down": Bug(
        "orchestrator/children.sql",
        "WHERE c.run_id = d.run_id AND c.cancel_requested_at IS NULL\n",
        "WHERE c.run_id = d.run_id AND c.cancel_requested_at IS NULL AND false\n",
        (
            Bug(
                "orchestrator/children.sql",
                "WHERE d.parent_id = w.run_id AND c.cancel_requested_at IS NULL\n",
                "WHERE d.parent_id = w.run_id AND c.cancel_requested_at IS NULL AND false\n",
            ),
        ),
    ),
    "output is taken for written though its row is held": Bug(
        "orchestrator/leased_writer.py",
        "        elif not in_doubt:\n            output.tried = False\n",
        "        elif not in_doubt:\n            output.written()\n",
    ),
    "output is written without the lease": Bug(
        "orchestrator/group_commit.sql",
        "WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'\n"
        "        AND r.last_seq >= x.after\n"
        "      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r\n), u AS (\n"
        "  UPDATE {schema}.runs r SET last_seq",
        "WHERE r.run_id = x.run_id AND x.token <> 0 AND r.state = 'running'\n"
        "        AND r.last_seq >= x.after\n"
        "      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r\n), u AS (\n"
        "  UPDATE {schema}.runs r SET last_seq",
    ),
    "output whose answer was lost is written again": Bug(
        "orchestrator/leased_writer.py",
        "find = partial(self._find_output, output.step, output.first)",
        "find = partial(self._find_output, output.step, -1)",
    ),
    "a suspect is one for ever": Bug(
        "orchestrator/suspects.py",
        "        self._running.pop(id(body), None)\n",
        "        if body.most == inf:\n            self._running.pop(id(body), None)\n",
    ),
    "a run that fails is not undone": Bug(
        "orchestrator/boundaries.py",
        "        if self.undoes and state is RunState.FAILED:\n",
        "        if self.undoes and state is RunState.QUEUED:\n",
    ),
    "a step that has failed is not undone": Bug(
        "orchestrator/undos.py",
        "            if not self._ended(named):\n",
        "            if not self._ended(named) and self._call(key).error is None:\n",
    ),
    "steps are undone in the order in which they began": Bug(
        "orchestrator/undos.py",
        "            named = self._named(key := self._open[-1])\n"
        "            if not self._ended(named):\n"
        "                return self._place(named, key)\n"
        "            self._open.pop()\n",
        "            named = self._named(key := self._open[0])\n"
        "            if not self._ended(named):\n"
        "                return self._place(named, key)\n"
        "            self._open.pop(0)\n",
    ),
    "an undo that fails for good ends the run": Bug(
        "orchestrator/undos.py",
        "        while self._open:\n",
        "        while self._open and all(call.error is None for call in self._calls.values()):\n",
    ),
    "a slot is not freed": Bug(
        "jobs/migrations/versions/0018_limits.pre.sql",
        "WHEN (OLD.limits IS NOT NULL AND OLD.state <> NEW.state\n"
        "        AND (OLD.state = 'running' OR NEW.finished_at IS NOT NULL))",
        "WHEN (OLD.limits IS NOT NULL AND OLD.state <> NEW.state\n"
        "        AND NEW.state = 'completed' AND OLD.attempt = 1)",
    ),
    "a slot is freed twice": Bug(
        "jobs/migrations/versions/0029_slots_by_run.pre.sql",
        "DELETE FROM limit_slots s WHERE s.run_id = OLD.run_id RETURNING s.limit_id, s.n\n",
        "DELETE FROM limit_slots s USING limit_slots o\n"
        "       WHERE o.run_id = OLD.run_id AND s.limit_id = o.limit_id\n"
        "         AND s.n IN (o.n, 3 - o.n) RETURNING s.limit_id, s.n\n",
    ),
    "a limit is read before the lock": Bug(
        "jobs/migrations/versions/0029_slots_by_run.pre.sql",
        "SELECT c.n INTO place FROM generate_series(1, each.at_once) c(n)\n"
        "       WHERE NOT EXISTS (SELECT FROM limit_slots s"
        " WHERE s.limit_id = each.id AND s.n = c.n)\n",
        "SELECT c.n INTO place FROM (SELECT 1 + floor(random() * 1000000)::int AS n) c\n"
        "       WHERE (SELECT count(*) FROM limit_slots s"
        " WHERE s.limit_id = each.id) < each.at_once\n",
    ),
    "a claim behind an end takes no slot": Bug(
        "orchestrator/lease.sql",
        "   WHERE limited AND {schema}.take_slots(run_id)\n",
        "   WHERE limited\n",
        (
            Bug(
                "jobs/migrations/versions/0029_slots_by_run.pre.sql",
                "     + (SELECT count(*) FROM limit_loans o WHERE o.run_id = NEW.run_id)\n",
                "     + 8\n",
            ),
        ),
    ),
    "a group that has had a turn is passed by": Bug(
        "jobs/migrations/versions/0023_age_after.pre.sql",
        "      FROM lane l CROSS JOIN LATERAL (\n",
        "      FROM (SELECT * FROM lane WHERE lane.finish IS NULL) l CROSS JOIN LATERAL (\n",
    ),
    "a debounce loses the last input": Bug(
        "orchestrator/duplicates.sql",
        "SET input = %(input)s::jsonb, default_input",
        "SET input = coalesce(input, %(input)s::jsonb), default_input",
    ),
    "an input is replaced that is executed": Bug(
        "orchestrator/duplicates.sql",
        "     AND state = 'queued' AND attempt = 0 AND retry_of IS NULL\n"
        "     AND cancel_requested_at IS NULL AND last_seq",
        "     AND state IN ('queued', 'running') AND retry_of IS NULL\n"
        "     AND cancel_requested_at IS NULL AND last_seq",
    ),
}
"""By what they do wrong."""
