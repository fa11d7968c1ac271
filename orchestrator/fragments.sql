-- Text that statements of several files of this package share.

-- fragment: run_columns
-- The columns of a run `r`, in the order in which a `Run` is made of them.
r.run_id, r.namespace, r.plan, r.plan_version, r.queue, r.state, r.input, r.result, r.error, r.key,
r.last_seq, r.attempt, r.worker, r.cancel_requested_at, r.not_before, r.deadline_at, r.retry_of,
r.created_at, r.started_at, r.finished_at, r.pruned_seq, {run_options}

-- fragment: claim_fence
-- First key of the advisory lock that each claim holds in shared mode; the second is 0.
'{schema}.queues'::regclass::oid
