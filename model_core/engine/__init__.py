"""From a prepared request to its last token: what waits, what runs, and how a token is chosen."""
