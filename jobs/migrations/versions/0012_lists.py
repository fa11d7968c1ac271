"""Lists of runs find their rows by an index, and ended runs are counted beforehand."""

from beatless.migrations import apply

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
