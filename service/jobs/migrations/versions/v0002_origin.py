"""Which request made a job, so that the worker's log and traces go on from it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Jobs that are there already came from nowhere."""
    op.add_column("jobs", sa.Column("request_id", sa.String(length=128), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("traceparent", sa.String(length=64), nullable=False, server_default=""))
