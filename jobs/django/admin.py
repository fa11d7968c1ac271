"""Runs in Django's admin: a list, a page for each, cancel and retry. Nothing else is changed here.

What is shown comes from the client, redacted as everywhere; Django's permissions decide who sees it
(`beatless.view_run`), cancels and retries (`beatless.cancel_run`, `beatless.retry_run`).
"""

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse

from beatless.client import Client
from beatless.django.models import Run
from beatless.django.project import app_of_project, given
from beatless.errors import BadRequest, JobsError
from beatless.namespaces import DEFAULT_NAMESPACE
from beatless.orchestrator.errors import EventsPruned, OrchestratorError, RunNotFound
from beatless.orchestrator.state import RunState

PAGE_RUNS = 50
RETRIED = (RunState.FAILED, RunState.CANCELLED)
"""The states of a run that a retry goes on with."""

MOST_EVENTS = 500
"""Of a run with more, the page shows the first ones; the run page has them all."""


@admin.register(Run)
class RunAdmin(admin.ModelAdmin):  # type: ignore[misc]  # Django has no types
    """Reads and acts through the client: the model has no table."""

    def has_add_permission(self, _request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, _request: HttpRequest, _run: Any = None) -> bool:
        return False

    def has_delete_permission(self, _request: HttpRequest, _run: Any = None) -> bool:
        return False

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view
        return [
            path("", view(self.changelist_view), name="beatless_run_changelist"),
            path("<path:run_id>/change/", view(self.run_view), name="beatless_run_change"),
        ]

    def changelist_view(self, request: HttpRequest, _context: Any = None) -> HttpResponse:
        """The runs, newest first, by state, plan and queue."""
        client = self._client(request)
        asked = {name: request.GET.get(name, "") for name in ("state", "plan", "queue")}
        before = request.GET.get("before")
        wanted: dict[str, Any] = {name: value or None for name, value in asked.items()}
        try:
            place = client.get_run(before) if before else None
            runs = client.list_runs(**wanted, before=place, limit=PAGE_RUNS + 1)
        except (BadRequest, RunNotFound) as error:
            self.message_user(request, str(error), messages.ERROR)
            runs = []
        following = request.GET.copy()
        if len(runs) > PAGE_RUNS:
            following["before"] = runs[PAGE_RUNS - 1].run_id
        return self._page(
            request,
            "runs",
            title="Runs",
            runs=runs[:PAGE_RUNS],
            following=following.urlencode() if len(runs) > PAGE_RUNS else "",
            asked=asked,
            states=list(RunState),
        )

    def run_view(self, request: HttpRequest, run_id: str) -> HttpResponse:
        """What is stored about a run; by POST, one of its two actions."""
        client = self._client(request)
        if request.method == "POST":
            return self._act(request, client, run_id)
        try:
            run = client.get_run(run_id)
            events = client.events(run_id, limit=MOST_EVENTS)
        except (BadRequest, RunNotFound) as error:
            raise Http404(str(error)) from error
        except EventsPruned:
            events = []  # it ended long ago
        url = given().get("PAGE_URL")
        return self._page(
            request,
            "run",
            title=f"Run {run.run_id}",
            run=run,
            input=_json(run.input),
            outcome=_json(run.error or run.result),
            events=[
                (event, datetime.fromtimestamp(event.ts / 1000, UTC), _json(event.data))
                for event in events
            ],
            page_url=f"{url.rstrip('/')}/#/run/{quote(run.run_id, safe='')}" if url else None,
            may_cancel=not run.state.final and request.user.has_perm("beatless.cancel_run"),
            may_retry=run.state in RETRIED and request.user.has_perm("beatless.retry_run"),
        )

    def _act(self, request: HttpRequest, client: Client, run_id: str) -> HttpResponse:
        action = request.POST.get("action")
        if action not in ("cancel", "retry") or not request.user.has_perm(f"beatless.{action}_run"):
            raise PermissionDenied
        shown = run_id
        try:
            if action == "cancel":
                client.cancel_run(run_id, reason=f"by {request.user.get_username()}, in the admin")
            else:
                shown = client.retry_run(run_id).run_id
        except (JobsError, OrchestratorError) as error:
            self.message_user(request, str(error), messages.ERROR)
        else:
            self.log_change(request, Run(run_id=run_id), action)
            done = {"cancel": "Its cancel is stored.", "retry": f"It retries {run_id}."}
            self.message_user(request, done[action], messages.SUCCESS)
        return HttpResponseRedirect(reverse("admin:beatless_run_change", args=[shown]))

    def _client(self, request: HttpRequest) -> Client:
        """Raises PermissionDenied."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        return app_of_project().client_for(DEFAULT_NAMESPACE, shown=True)

    def _page(self, request: HttpRequest, name: str, **shown: Any) -> HttpResponse:
        context = {**self.admin_site.each_context(request), "opts": self.opts, **shown}
        return TemplateResponse(request, f"beatless/admin_{name}.html", context)


def _json(value: Any) -> str:
    """Empty for None, which most events have."""
    return "" if value is None else json.dumps(value, ensure_ascii=False, indent=1)
