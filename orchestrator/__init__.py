"""What a run is: plans, events, states, the journal, leases and the executor."""
