"""An app of somebody's with the API in it: `uvicorn tests.hosted:host`."""

from fastapi import FastAPI

from beatless.api import create_api
from tests.plans import app

host = FastAPI()
host.mount("/jobs", create_api(app))
