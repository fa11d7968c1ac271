"""Settings of the shop. Servers come from the environment, as `beatless dev` gives them."""

import os

from beatless.django import database

DATABASE_URL = os.environ.get("BEATLESS_DATABASE_URL", "postgresql://shop@localhost/shop")

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "beatless.django",
    "shop",
]
DATABASES = {"default": database(DATABASE_URL), "reports": database(DATABASE_URL)}
BEATLESS = {  # what the environment leaves open
    "REDIS_URL": "redis://localhost:6379/0",
    "SCHEMA": "beatless",
    "ON_FAILURE": "shop.orders.note_failure",
    "PAGE_URL": "http://localhost:8400",  # links from the admin to the run page
}
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "shop.urls"
SECRET_KEY = os.environ.get("SECRET_KEY", "only for development")
DEBUG = True
ALLOWED_HOSTS = ["*"]
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
