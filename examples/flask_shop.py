"""Flask and Flask-SQLAlchemy: an order and its run in one transaction, models in a step.

pip install flask flask-sqlalchemy
beatless --app flask_shop:app dev --env-file dev.env     # then, in a second terminal:
set -a; . ./dev.env; set +a; flask --app flask_shop:host create-tables
flask --app flask_shop:host run     # curl -X POST http://127.0.0.1:5000/orders/book
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column

from beatless import App, Plan, Settings, StepContext, step

URL = os.environ["BEATLESS_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
host = Flask(__name__)
host.config["SQLALCHEMY_DATABASE_URI"] = URL
db = SQLAlchemy(host)


class Order(db.Model):  # type: ignore[name-defined]
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    state: Mapped[str] = mapped_column(default="new")


def in_flask(body: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(body)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with host.app_context():  # whose end gives the connection of db.session back
            return body(*args, **kwargs)

    return inside


@step
@in_flask
def ship(ctx: StepContext) -> str:
    order = db.session.get_one(Order, ctx.input["order"])
    order.state = "shipped"  # may be repeated
    db.session.commit()
    return f"{order.title} is shipped"


app = App(Settings.from_env(), [Plan("fulfil", [ship])])
host.cli.command("create-tables")(db.create_all)


@host.post("/orders/<title>")
def place_order(title: str) -> dict[str, Any]:
    db.session.add(order := Order(title=title))
    db.session.flush()  # gives it its id
    run = app.client.start_run("fulfil", {"order": order.id}, connection=db.session)
    db.session.commit()  # both, or neither
    return {"order": order.id, "run": run.run_id}
