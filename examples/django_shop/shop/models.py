"""Rows of the shop."""

from django.db import models


class Order(models.Model):
    """Names its run, so that pages can follow it."""

    title = models.TextField()
    state = models.TextField(default="new")
    run_id = models.TextField(blank=True)
