"""Tokens of streams are bound to the token that made them."""

from beatless.migrations import apply

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
