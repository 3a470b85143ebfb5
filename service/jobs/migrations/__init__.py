"""The schema's history, run by Database.migrate; each version says what it adds and never changes afterwards."""
