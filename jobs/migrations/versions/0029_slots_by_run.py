"""Claims and ends of runs with limits look for slots by the run, and pass places on."""

from beatless.migrations import apply

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
