"""The plans of the shop: `beatless.django` finds this module in each app."""

from beatless import Plan, StepContext, retry, step
from shop.models import Order


@step
def reserve(ctx: StepContext) -> str:
    # May be repeated: the step runs again if its process dies before its end is stored.
    Order.objects.filter(pk=ctx.input["order"]).update(state="reserved")
    return "reserved"


@step(retry=retry(max_attempts=5))
def ship(ctx: StepContext) -> str:
    order = Order.objects.get(pk=ctx.input["order"])
    order.state = "shipped"
    order.save(update_fields=["state"])
    return f"{order.title} is shipped"


fulfil = Plan("fulfil", [reserve, ship])
