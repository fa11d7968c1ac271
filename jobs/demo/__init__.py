"""The plans that `beatless demo` runs, and that `beatless` knows when no app is named."""

from beatless.demo.agents import agents_run
from beatless.demo.census import code_census

PLANS = (agents_run, code_census)

__all__ = ["PLANS", "agents_run", "code_census"]
