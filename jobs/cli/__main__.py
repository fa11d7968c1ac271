"""`python -m beatless.cli`, which `beatless dev` uses for its processes."""

from beatless.cli import main

main()
