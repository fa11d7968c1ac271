"""A plan's Celery task is the relay's to send: whoever calls it is told how to start a run."""

from types import SimpleNamespace

import celery as library
import pytest
from celery import Celery, _state, chain, group, signature
from celery.app.task import Context
from celery.worker import control

from beatless import App, Plan, Settings, step
from beatless.worker.celery_app import Configuration
from beatless.worker.tasks import RunTask, register


@step
def one(ctx):
    return 1


app = App(
    Settings(database_url="postgresql://nowhere.invalid/", redis_url="redis://nowhere.invalid/"),
    plans=[Plan("checkout", [one])],
)
task = app.celery.tasks["checkout"]


@app.celery.task(shared=False, name="shop.mail")
def mail():
    pass


def by_name():
    return signature("checkout", args=(1,), app=app.celery)


@pytest.mark.parametrize(
    "call",
    [
        lambda: task(1),
        lambda: task.delay(1),
        lambda: task.apply_async((1,), countdown=5),
        lambda: task.apply((1,)),
        lambda: task.s(1),
        lambda: task.si(1),
        lambda: task.signature((1,)),
        lambda: task.subtask((1,)),
        lambda: task.map([1]),
        lambda: task.chunks([1], 1),
        lambda: by_name().delay(),
        lambda: by_name().apply_async(),
        lambda: by_name().apply(),
        lambda: by_name()(2),
        lambda: chain(by_name(), mail.si()).delay(),
        lambda: group([by_name(), by_name()], app=app.celery).delay(),
        lambda: app.celery.send_task("checkout", (1,)),
    ],
)
def test_calling_the_task_of_a_plan_says_how_to_start_a_run(call):
    with pytest.raises(TypeError, match=r'app\.client\.start_run\("checkout", input\)'):
        call()


def test_a_worker_executes_what_was_sent_to_it_and_no_call_within():
    executed = []

    class Recorder:
        def execute(self, plan, run_id, dispatch):
            executed.append((plan.name, run_id, dispatch))
            with pytest.raises(TypeError, match="start a run"):
                within("r2", 1)

    plan = Plan("within", [one])
    register(app.celery, plan, Recorder)  # type: ignore[arg-type]  # as much as the task needs
    within = app.celery.tasks["within"]
    within.request_stack.push(Context(id="r1.1", args=("r1", 1), called_directly=False))
    within("r1", 1)
    within.request_stack.pop()
    assert executed == [("within", "r1", 1)]


def test_the_settings_of_celery_are_read_once_for_all_plans(monkeypatch):
    read = Configuration.__getitem__
    names = []

    def noted(settings, name):
        names.append(name)
        return read(settings, name)

    monkeypatch.setattr(Configuration, "__getitem__", noted)
    plans = [Plan(f"plan-{number}", [one]) for number in range(9)]
    fleet = App(app.settings, plans=plans).celery
    assert names.count("task_acks_late") == 1

    first, second = (fleet.tasks[plan.name] for plan in plans[:2])
    assert first.acks_late is second.acks_late is fleet.conf.task_acks_late
    assert type(first).__header__ is type(second).__header__
    assert first.request_stack is not second.request_stack


@pytest.fixture
def of_project(monkeypatch):
    """What tasks of this test leave in Celery goes with it."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set())


def test_a_plan_may_have_the_name_of_a_task(of_project):
    """As those that `plan from-celery` proposes: the task is copied into each app otherwise."""
    project = Celery("shop", set_as_current=False)

    @project.task(name="shop.pack", bind=True)
    def pack(self, line):
        return self.name, line

    fleet = App(app.settings, plans=[Plan("shop.pack", [one])]).celery
    fleet.finalize()

    assert isinstance(fleet.tasks["shop.pack"], RunTask)
    assert pack("tea") == ("shop.pack", "tea")
    assert not isinstance(project.tasks["shop.pack"], RunTask)


def test_a_plan_keeps_its_name_when_the_tasks_come_later(of_project):
    fleet = App(app.settings, plans=[Plan("shop.wrap", [one])]).celery
    fleet.finalize()

    @library.shared_task(name="shop.wrap")  # noqa: TID251 - as users have them
    def wrap(line):
        return line

    assert isinstance(fleet.tasks["shop.wrap"], RunTask)


def test_a_step_never_takes_a_run_for_a_shared_task_of_the_name(of_project, monkeypatch):
    """Without an app of the project's own, that of the fleet is the current one."""

    @library.shared_task(name="shop.share")  # noqa: TID251 - as users have them
    def share(to):
        return to

    fleet = App(app.settings, plans=[Plan("shop.share", [Plan.task(share, name="share")])])
    monkeypatch.setattr(_state._tls, "current_app", fleet.celery)
    context = SimpleNamespace(
        key="k", attempt=1, run_id="r", worker="w", queue="q", priority=0, input="tea"
    )
    with pytest.raises(TypeError, match=r"shop\.share is a plan of beatless"):
        fleet.plans["shop.share"].steps[0](context)


def test_a_rate_limit_of_a_plan_is_refused_with_an_answer():
    with pytest.raises(ValueError, match="runs have no rate limit"):
        task.rate_limit = "1/m"
    task.rate_limit = "0"
    assert task.rate_limit is None
    mail.rate_limit = "1/m"


@pytest.mark.parametrize("limits", [{"soft": 5.0}, {"hard": 5.0}, {"soft": 5.0, "hard": 9.0}])
def test_a_time_limit_of_a_plan_is_refused_with_an_answer(limits):
    state = SimpleNamespace(app=app.celery)
    with pytest.raises(ValueError, match="give their steps a timeout"):
        control.time_limit(state, "checkout", **limits)
    control.time_limit(state, "checkout")
    assert (task.soft_time_limit, task.time_limit) == (None, None)
    control.time_limit(state, "shop.mail", hard=5.0)
    assert mail.time_limit == 5.0
    mail.time_limit = None
