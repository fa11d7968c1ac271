"""Pages of the shop."""

from django.contrib import admin
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from beatless.django import client
from shop.models import Order
from shop.orders import place_order


@csrf_exempt
def orders(request: HttpRequest) -> JsonResponse:
    order = place_order(request.POST["title"])
    return JsonResponse({"order": order.pk, "run": order.run_id}, status=201)


def order(_: HttpRequest, number: int) -> JsonResponse:
    found = Order.objects.get(pk=number)
    return JsonResponse({"state": found.state, "run": client().get_run(found.run_id).state})


urlpatterns = [
    path("orders", orders),
    path("orders/<int:number>", order),
    path("admin/", admin.site.urls),
]
