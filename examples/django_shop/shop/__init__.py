"""A shop: each order is followed by a run."""
