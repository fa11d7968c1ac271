"""The settings of Django's own tests of its tasks."""

import os

from beatless.django import database

SECRET_KEY = "only for tests"
INSTALLED_APPS = ["beatless.django", "tasks"]
DATABASES = {"default": database(os.environ["BEATLESS_DATABASE_URL"])}
BEATLESS = {"MIGRATE": False}  # each test has a schema by the kit
TASKS = {"default": {"BACKEND": "beatless.django.tasks.BeatlessBackend", "QUEUES": []}}
USE_TZ = True
