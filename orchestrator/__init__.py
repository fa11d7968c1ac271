"""Runs: plans, events, states, the journal, leases and the executor."""
