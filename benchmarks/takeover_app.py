"""The app of the processes that `benchmarks.takeover` kills."""

from beatless import App, Settings
from benchmarks.takeover import PLANS

app = App(Settings.from_env(), PLANS)
