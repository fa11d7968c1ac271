"""Commands about plans: their graph, as text and as a picture."""

from collections.abc import Iterator, Sequence
from html import escape

import click

from beatless.cli.environment import Environment
from beatless.cli.options import plan_names
from beatless.errors import UnknownPlan
from beatless.orchestrator.child_elements import ChildElement
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.limit import Limit, rule_of
from beatless.orchestrator.outcomes import Goto
from beatless.orchestrator.plan import Element, Plan
from beatless.orchestrator.progress import UNKNOWN_STEP
from beatless.orchestrator.waits import Wait, WaitKind
from beatless.places import UNKNOWN_PLAN, Place, places
from beatless.transactions import reaching_postgres
from beatless.worker import canary

NAMED = 10
"""Runs of one place that are named to a person."""

KEEP = (
    "keep the step until they have left it (`beatless runs --step {step}`), or say what it is "
    'called now: Plan(…, renamed={{"{step}": "its name now"}})'
)
"""The advice about a plan that is a list, which lacks this step."""

DEPLOY = (
    "the app of this command lacks the plan: deploy code that has it, or cancel its runs "
    "(`beatless cancel RUN`)"
)
"""The advice about a plan that this app does not have."""

LEAVES_OUT = (
    "will end without {steps}, which this version does not have: if they shall do it, keep it in "
    "the list until they have ended, or give the new plan another name"
)
"""The advice about a plan that is a list, from which a step was removed ahead of its runs."""

FORMER = (
    "{wait} for {signals}, as when the wait began, which no {ignored} ends: send {signals} while "
    "`beatless waits --plan {plan}` lists such a wait"
)
"""The advice about a wait of a plan that is a list, which names signals that it did not."""

WIDTH, HEIGHT, GAP, LANE, MARGIN = 230, 44, 30, 26, 24


@click.group()
def plan() -> None:
    """The plans of the app."""


@plan.command()
@click.argument("name", shell_complete=plan_names)
@click.option("--svg", is_flag=True, help="A picture, on stdout.")
@click.pass_obj
def show(env: Environment, name: str, svg: bool) -> None:
    """Draw the steps of plan NAME and the routes between them. Needs no servers."""
    env.needs_servers = False
    found = env.app.plans.get(name)
    if found is None:
        raise UnknownPlan(name, list(env.app.plans))
    if env.as_json:
        env.document(as_dict(found))
    else:
        click.echo(as_svg(found) if svg else as_text(found))


@plan.command()
@click.pass_obj
def check(env: Environment) -> None:
    """Whether every unfinished run can go on with the plans of this code.

    Run it with the code that is to be deployed. Exit status 1 if a run would wait, because it is in
    a step, or of a plan, that this code does not have, or gives a stored step other arguments. Runs
    that would go on without a step that was removed ahead of them are told, and change no status;
    so are runs of a list that wait, and not for a signal that its wait names now.
    A plan that is a function is called on the stored results of each of its runs; no step is.
    """
    known = {**env.app.plans, canary.NAME: canary.canary(list(env.app.plans.values()))}
    with reaching_postgres(env.app.settings.schema, env.app.engine):
        found = places(env.app.engine, env.app.journal, known)
    waiting = sum(place.runs for place in found if place.waits)
    if env.as_json:
        env.document(
            {
                "unfinished": sum(place.runs for place in found),
                "waiting": waiting,
                "places": [place.to_dict() for place in found],
            }
        )
    else:
        for place in found:
            click.echo(place_line(place))
        if not found:
            click.echo("no run is unfinished")
    if waiting:
        for text in advised([place for place in found if place.waits]):
            env.note(text)
    for text in (*shortened(found), *former(found)):
        env.note(text)
    if waiting:
        raise click.exceptions.Exit(1)


@plan.command("from-celery")
@click.argument("celery_app", metavar="MODULE:APP")
@click.pass_obj
def from_celery(env: Environment, celery_app: str) -> None:
    """Print a plan for each task of a Celery app, as Python source.

    Its modules are imported; no task is called, nothing is stored. A comment above a plan names
    what a step does otherwise.
    """
    from beatless.cli.beat import celery_app_of  # Celery is half of the time to start
    from beatless.cli.celery_plans import lines_of

    env.needs_servers = False
    env.find_settings()
    for line in lines_of(celery_app_of(celery_app), celery_app):
        click.echo(line)


def advised(waiting: Sequence[Place]) -> Iterator[str]:
    """One line for each advice, which names its places where there are several."""
    alike: dict[str, list[Place]] = {}
    for place in waiting:
        lacks = KEEP.format(step=place.step)
        advice = place.advice or (DEPLOY if place.waits == UNKNOWN_PLAN else lacks)
        alike.setdefault(advice, []).append(place)
    for advice, found in alike.items():
        of = ", ".join(dict.fromkeys(f"{place.plan} {_where(place)}" for place in found))
        runs = count(sum(place.runs for place in found), "run")
        yield f"{runs}{f' ({of})' if len(alike) > 1 else ''} would wait: {advice}"


def shortened(found: Sequence[Place]) -> Iterator[str]:
    """One line for the steps that runs would end without, with the places of these runs."""
    alike: dict[str, list[Place]] = {}
    for place in found:
        if place.leaves_out:
            alike.setdefault(" and ".join(place.leaves_out), []).append(place)
    for steps, where in alike.items():
        of = ", ".join(f"{place.plan} {_where(place)}" for place in where)
        runs = count(sum(place.runs for place in where), "run")
        yield f"{runs} ({of}) {LEAVES_OUT.format(steps=steps)}"


def former(found: Sequence[Place]) -> Iterator[str]:
    """One line for each place whose runs wait, and not for all that this version waits for."""
    for place in found:
        if place.ignores:
            runs, wait = count(place.runs, "run"), "waits" if place.runs == 1 else "wait"
            told = FORMER.format(
                wait=wait,
                signals=" or ".join(place.waits_for),
                ignored=" or ".join(place.ignores),
                plan=place.plan,
            )
            yield f"{runs} ({place.plan} {_where(place)}) {told}"


def _where(place: Place) -> str:
    return "not begun" if place.step is None else f"in {place.step}"


def place_line(place: Place) -> str:
    """Count the unfinished runs at each step of each plan; list those that cannot continue."""
    text = f"{place.plan}  {count(place.runs, 'run')} {_where(place)}"
    if place.waits is None:
        without = f", without {' and '.join(place.leaves_out)}" if place.leaves_out else ""
        return f"{text}: can go on{without}"
    lacks = "has no such step" if place.waits == UNKNOWN_STEP else "is not in this app"
    named = ", ".join(place.run_ids[:NAMED])
    more = place.runs - NAMED
    named += f" and {more} more" if more > 0 else ""
    return f"{text}: would wait, {place.difference or f'the plan {lacks}'}: {named}"


def count(number: int, word: str) -> str:
    """As in "1 run", "2 runs"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def as_dict(found: Plan) -> dict[str, object]:
    """The graph as a JSON object."""
    return {
        "plan": found.name,
        "version": found.version,
        "queue": found.queue,
        "steps": [
            {"name": each.name, "next": found.following(each.name)} | _members(each)
            for each in found.elements
        ],
        "on_cancel": None if found.on_cancel is None else found.on_cancel.name,
        "renamed": found.renamed,
    }


def _members(element: Element) -> dict[str, object]:
    """The options of a step, or of a wait, as JSON."""
    if isinstance(element, ChildElement):
        return {
            "wait": element.kind.value,
            "plan": element.plan.name,
            "at_once": element.at_once,
            "failure": "collect" if element.collects else "fail",
        }
    if isinstance(element, Wait):
        members: dict[str, object] = {
            "wait": element.kind.value,
            "signals": list(element.names),
            "timeout": element.seconds,
        }
        return members if element.title is None else members | {"title": element.title}
    return {
        "timeout": element.timeout,
        "max_attempts": element.retry.max_attempts,
        "transactional": element.transactional,
        "terminate_on_cancel": element.terminate_on_cancel,
        "undo": None if element.undo is None else element.undo.name,
    }


def notes(step: Element) -> str:
    """The options of a step, or of a wait, in short."""
    if isinstance(step, ChildElement):
        if step.alone:
            return f"a run of plan {step.plan.name}"
        places = "" if step.at_once is None else f", {step.at_once} at once"
        return f"runs of plan {step.plan.name}{places}"
    if isinstance(step, Wait):
        if step.kind is WaitKind.SLEEP:
            return f"sleeps for {step.seconds:g} s"
        ends = "" if step.seconds is None else f", at most {step.seconds:g} s"
        waits_for = f'a person, "{step.title}"' if step.title else " or ".join(step.names)
        return f"waits for {waits_for}{ends}"
    found = []
    if step.timeout is not None:
        found.append(f"{step.timeout:g} s")
    if step.retry.max_attempts > 1:
        found.append(f"{step.retry.max_attempts} attempts")
    if step.transactional:
        found.append("transactional")
    if step.terminate_on_cancel:
        found.append("ended by a cancel")
    found += rules_of(step.limits)
    if step.undo is not None:
        found.append(f"undone by {step.undo.name}")
    return ", ".join(found)


def ends(found: Plan, step: Element) -> bool:
    """Whether the run may complete with this step, as far as the plan shows."""
    if isinstance(found, FunctionPlan):
        return False
    if isinstance(step, Wait) or step.falls_through:
        return found.after(step.name) is None
    return step.outcomes != {Goto}


def rules_of(limits: Sequence[Limit]) -> list[str]:
    """The limits of a plan or a step, in short."""
    return [f"limit {each.name}: {rule_of(each)}" for each in limits]


def as_text(found: Plan) -> str:
    """One line for each step, with the routes that leave it."""
    kind = ", a function that names these steps" if isinstance(found, FunctionPlan) else ""
    rules = "".join(f", {rule}" for rule in rules_of(found.limits))
    lines = [f"{found.name}  version {found.version}, queue {found.queue}{rules}{kind}", ""]
    for step in found.elements:
        about = f"  ({notes(step)})" if notes(step) else ""
        lines.append(f"  {step.name}{about}")
        onward = found.falls_through(step.name) and found.after(step.name) is not None
        if onward:
            lines.append("   │")
        leaving = [f"─▶ {target}" for target in found.routes.get(step.name, ())]
        if ends(found, step):
            leaving.append("─■ the run completes")
        corners = ["├"] * len(leaving)
        if leaving and not onward:
            corners[-1] = "└"
        lines += [f"   {corner}{way}" for corner, way in zip(corners, leaving, strict=True)]
        lines.append("   ▼" if onward else "")
    if found.on_cancel is not None:
        about = f"  ({notes(found.on_cancel)})" if notes(found.on_cancel) else ""
        lines += [f"  when cancelled: {found.on_cancel.name}{about}"]
    return "\n".join(lines).rstrip()


def as_svg(found: Plan) -> str:
    """Steps from top to bottom, the default route between them, other routes beside them."""
    places = {step.name: place for place, step in enumerate(found.elements)}
    routes = [
        (places[step.name], places[target])
        for step in found.elements
        for target in found.routes.get(step.name, ())
    ]
    # The shorter a route, the nearer to the steps it runs, so that fewer of them cross.
    routes.sort(key=lambda route: abs(route[0] - route[1]))
    height = MARGIN * 2 + 30 + (len(found.elements) + bool(found.on_cancel)) * (HEIGHT + GAP)
    width = MARGIN * 2 + WIDTH + LANE * (len(routes) + 1)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f"<title>Plan {escape(found.name)}</title>",
        (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>'
        ),
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        (
            f'<text x="{MARGIN}" y="{MARGIN + 10}" font-weight="600">{escape(found.name)} '
            f'<tspan fill="#777" font-weight="400">{found.version}</tspan></text>'
        ),
    ]

    def top(place: int) -> int:
        return MARGIN + 30 + place * (HEIGHT + GAP)

    def box(step: Element, place: int, stroke: str, label: str = "") -> None:
        y, about = top(place), label + notes(step)
        parts.append(
            f'<rect x="{MARGIN}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f6f8fa" '
            f'stroke="{stroke}"/><text x="{MARGIN + 12}" y="{y + (19 if about else 27)}">'
            f"{escape(step.name)}</text>"
        )
        if about:
            parts.append(
                f'<text x="{MARGIN + 12}" y="{y + 35}" font-size="11" fill="#777">'
                f"{escape(about)}</text>"
            )

    def line(path: str) -> None:
        parts.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#tip)"/>')

    for step in found.elements:
        place = places[step.name]
        box(step, place, "#0969da")
        middle = MARGIN + WIDTH // 2
        if found.falls_through(step.name) and found.after(step.name) is not None:
            line(f"M{middle} {top(place) + HEIGHT}V{top(place + 1) - 1}")
        elif ends(found, step):
            y = top(place) + HEIGHT
            parts.append(f'<path d="M{middle} {y}v12" stroke="#555"/>')
            parts.append(f'<circle cx="{middle}" cy="{y + 16}" r="4" fill="#555"/>')
    for lane, (source, target) in enumerate(routes, 1):
        right, x = MARGIN + WIDTH, MARGIN + WIDTH + lane * LANE
        # Leaves below or above the middle, where the routes from elsewhere arrive.
        down = 12 if target >= source else -12
        start, end = top(source) + HEIGHT // 2 + down, top(target) + HEIGHT // 2
        line(f"M{right} {start}H{x}V{end}H{right + 1}")
    if found.on_cancel is not None:
        box(found.on_cancel, len(found.elements), "#bf8700", "when cancelled ")
    return "\n".join([*parts, "</svg>"])
