"""The revisions of the schema, one file each; docs/migrations.md has the rules for authors."""
