"""What the shop does."""

import logging

from django.db import transaction

from beatless import Failure
from beatless.django import start_run
from shop.models import Order

logger = logging.getLogger(__name__)


def place_order(title: str) -> Order:
    """An order and its run: both are stored, or neither."""
    with transaction.atomic():
        order = Order.objects.create(title=title)
        run = start_run("fulfil", {"order": order.pk}, key=f"order:{order.pk}")
        order.run_id = run.run_id
        order.save(update_fields=["run_id"])
    return order


def note_failure(failure: Failure) -> None:
    """Called once for each run that has failed for good (ON_FAILURE in the settings)."""
    logger.error("an order needs a person: %s", failure)
