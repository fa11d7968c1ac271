"""The shop's app, for processes of their own."""

from beatless import App, Settings
from tests.browser.plans import answers, billing, checkout, payment, refund

app = App(Settings.from_env(), [checkout, payment, refund, answers, billing])
