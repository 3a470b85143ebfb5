"""What every answer tells a browser: nothing of it runs, loads, is framed, or is guessed to be a page.

The answers of this server are data; one that is a page brings a policy of its own, which then stands.
"""

from __future__ import annotations

#: Raw, as ASGI has headers. The policy is the strictest there is: an answer that is shown as a page can do nothing.
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
