"""`python -m beatless`: the command `beatless`, as `beatless dev` starts its processes."""

from beatless.cli import main

main()
