"""What retention needs: how far a run is pruned, and what is due next."""

from beatless.migrations import apply

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
