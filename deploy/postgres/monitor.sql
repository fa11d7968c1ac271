-- The rights of the role beatless_monitor; run as beatless_owner, after the first `beatless migrate`.
-- No input, result, error, tag, key or event of any run, and no token; but the keys of limits and the
-- names of groups, whose runs are counted.
GRANT SELECT ON "beatless".beatless_version, "beatless".run_outbox, "beatless".queues,
  "beatless".workers, "beatless".limit_slots, "beatless".limit_settings,
  "beatless".rate_settings TO beatless_monitor;
GRANT SELECT (run_id, shard, task, queue, priority, state, due_at, reason, attempts, deadline_at,
  parent_id, child_no, children_left, wakes_on_failure, schedule_id, dedupe_next,
  limit_id, limit_since, group_id)
  ON "beatless".dispatches TO beatless_monitor;
GRANT SELECT (run_id, namespace, plan, plan_version, queue, priority, state, last_seq, attempt,
  lease_expires_at, worker, cancel_requested_at, not_before, created_at, started_at, finished_at)
  ON "beatless".runs TO beatless_monitor;
GRANT SELECT (run_id, seq, ts, type, source, step, attempt) ON "beatless".run_events
  TO beatless_monitor;
GRANT SELECT (id, kind, run_id, created_at) ON "beatless".dead_letters TO beatless_monitor;
GRANT SELECT (id, namespace, name, app, state, cron, every, tz, tick, due_at, look_at, last_tick,
  last_run_id, last_fired_at, last_late_s, failures) ON "beatless".schedules TO beatless_monitor;
