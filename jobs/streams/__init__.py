"""Live streams of runs: the journal, then Redis, in order and each event once."""
