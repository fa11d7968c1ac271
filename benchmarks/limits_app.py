"""The app of the processes that `benchmarks.limits` measures."""

from beatless import App, Settings
from benchmarks.limits import PLANS

app = App(Settings.from_env(), PLANS)
