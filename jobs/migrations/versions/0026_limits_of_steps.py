"""Limits of steps: their slots are taken when a step begins, and freed when it ends."""

from beatless.migrations import apply

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
