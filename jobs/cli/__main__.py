"""`python -m jobs.cli`, which `beatless dev` uses for its processes."""

from jobs.cli import main

main()
