"""What a process reports about itself: log lines, metrics, spans, and its readiness to systemd."""
