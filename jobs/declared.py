"""Stores what an App declares, as a deploy does: schedules, and plans that SQL may start."""

from beatless.app import App


def store_declared(app: App) -> list[str]:
    """Store the schedules and plans of this App; a line for each change, to be told.

    Raises BadRequest for a schedule that cannot be stored, and Unreachable.
    """
    applied = app.client.apply_schedules(app.schedules)
    withdrawn = app.client.apply_plans()
    return [
        *(f"schedule {name} is new" for name in applied.created),
        *(f"schedule {name} is changed" for name in applied.changed),
        *(
            f"schedule {name} is paused: the app {app.name} declares it no more"
            for name in applied.undeclared
        ),
        *(
            f"schedule {name} is stopped: the app {app.name} has no such plan any more, or the "
            "plan has a limit without a key for its input"
            for name in applied.stopped
        ),
        *(
            f"plan {name} cannot be started from SQL any more: the app {app.name} declares it "
            "no more"
            for name in withdrawn
        ),
    ]
