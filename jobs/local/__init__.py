"""Servers and processes that `beatless dev`, the demo and tests start on this machine."""
