"""Alembic's hook: runs the migrations on the connection that the catalog hands over."""

from alembic import context

from memcube.catalog.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()
