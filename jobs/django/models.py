"""The model by which Django's permissions and admin know runs. It has no table in Django."""

from django.db import models


class Run(models.Model):  # type: ignore[misc]  # Django has no types
    """Names the permissions: what is stored of a run comes from the client, not from here."""

    run_id = models.TextField(primary_key=True)

    def __str__(self) -> str:
        return str(self.run_id)

    class Meta:
        """Never migrated: our schema has migrations of its own."""

        managed = False
        app_label = "beatless"
        default_permissions = ("view",)
        permissions = (("cancel_run", "Can cancel run"), ("retry_run", "Can retry run"))
