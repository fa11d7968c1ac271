"""`pytest` starts Postgres and Valkey by itself."""

import pytest
from django.db import transaction
from django.test import Client
from shop.models import Order
from shop.orders import place_order


def test_an_order_is_shipped(beatless, db):
    answer = Client().post("/orders", {"title": "book"}).json()
    beatless.work_until_idle()
    assert beatless.client.get_run(answer["run"]).result == "book is shipped"
    assert Client().get(f"/orders/{answer['order']}").json() == {
        "state": "shipped",
        "run": "completed",
    }


def test_an_order_that_is_rolled_back_has_no_run(beatless, db):
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        place_order("book")
        1 / 0
    assert beatless.client.list_runs() == []
    assert not Order.objects.exists()


def test_an_order_is_shipped_though_the_worker_dies(beatless, db):
    order = place_order("book")
    with beatless.crash(at="step.effect_done"):
        beatless.work_until_idle()
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    order.refresh_from_db()
    assert order.state == "shipped"
    beatless.verify()
