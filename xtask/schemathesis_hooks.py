"""Teaches schemathesis what it cannot know: how the lines of imports are written, and which key it must not end."""

import json
import os
from urllib.parse import unquote

import schemathesis

# What it finds in answers, schemathesis asks for later: in the end also for the key that it comes with.
SPARED = os.environ["SPARED"].split(",")


@schemathesis.serializer("application/x-ndjson")
def one_line(_context, value):
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


def spares(parameters):
    return not any(unquote(str(value)).lower() in SPARED for value in (parameters or {}).values())


@schemathesis.hook
def filter_path_parameters(_context, path_parameters):
    return spares(path_parameters)


@schemathesis.hook
def filter_case(_context, case):
    return spares(case.path_parameters)
