"""Where the time of a request or of a job went: spans, told to whatever tracer the composition root has chosen.

`span.py` is what the rest of the service knows; `otel.py` alone imports OpenTelemetry, and is imported only where
`choose.py` was asked for it. No attribute ever holds what users send: names of this program, counts and codes.
"""
