"""Celery workers that execute runs: configuration, executors, bootsteps, tasks.

The broker holds what waits, the lease holds what runs, Postgres knows both. So messages are
acknowledged early, nothing is prefetched, and messages that the broker loses are sent again.
"""
