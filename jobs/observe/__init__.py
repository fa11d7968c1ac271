"""Reports of a process: log lines, metrics, spans, and its readiness to systemd."""
