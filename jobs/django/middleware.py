"""Errors of beatless in views, answered as the HTTP API of beatless answers them."""

from django.http import HttpRequest, HttpResponse
from django.utils.deprecation import MiddlewareMixin

from beatless.problem import answer_to


class ProblemMiddleware(MiddlewareMixin):  # type: ignore[misc]  # Django has no types
    """In MIDDLEWARE: views answer errors by the documents of `beatless.problem_of`.

    An error that is no answer to a request, as BadSetting, is Django's affair as before.
    """

    def process_exception(self, _request: HttpRequest, error: Exception) -> HttpResponse | None:
        """What Django calls with an exception that a view has raised."""
        found = answer_to(error)
        if found is None:
            return None
        return HttpResponse(found.body, status=found.status, headers=found.headers)
