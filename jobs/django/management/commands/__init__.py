"""The command `manage.py beatless`."""
