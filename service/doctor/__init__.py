"""`dve doctor`: whether a server and a worker with these settings would run here, one line a question.

`finding.py` is a line; `machine.py`, `host.py` and `jobs.py` look, each at one side; `command.py` asks them all. It
changes nothing: no folder is made, no schema is brought up to date, no key is written.
"""
