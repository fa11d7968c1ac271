"""Tasks of the shop beside those of the page: appended to its `shop/tasks.py`."""

from django.tasks import task

from beatless import retry

calls: list[str] = []
"""Of this process, in order."""


class Card:
    """Has an error of its own."""

    class Declined(Exception):
        """Its path is not its name."""


@task
def note(name):
    calls.append(name)


# No attempt is due before a test moves the time.
@task(retry=retry(max_attempts=3, initial=1800, cap=1800), takes_context=True)
def charge(context, declined):
    calls.append(f"attempt {context.attempt}")
    if context.attempt <= declined:
        raise Card.Declined(f"no {context.attempt}")
    return {"id": context.task_result.id, "status": str(context.task_result.status)}


@task(queue_name="mail")
async def send(to):
    return f"sent to {to}"


@task
def unreadable():
    return object()


@task
def leave():
    raise SystemExit(3)
