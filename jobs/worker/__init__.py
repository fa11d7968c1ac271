"""Celery workers that execute runs: configuration, executors, bootsteps, tasks.

The broker holds waiting runs, the lease holds active ones, Postgres knows both. So messages are
acknowledged early, nothing is prefetched, and messages that the broker loses are sent again.
"""
