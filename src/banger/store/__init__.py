"""The database of what is: SQLite with forward-only migrations."""
