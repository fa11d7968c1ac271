"""The app of the processes that `benchmarks.waits` starts."""

from beatless import App, Settings
from benchmarks.waits.plans import PLANS

app = App(Settings.from_env(), PLANS)
