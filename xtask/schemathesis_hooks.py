"""Teaches schemathesis what it cannot know: how the lines of imports are written, and which key it must not end."""

import json
import os

import schemathesis

# What it finds in answers, schemathesis asks for later: in the end also for the key that it comes with.
SPARED = os.environ["SPARED"].split(",")


@schemathesis.serializer("application/x-ndjson")
def one_line(_context, value):
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


@schemathesis.hook
def filter_path_parameters(_context, path_parameters):
    return path_parameters is None or not any(str(value).lower() in SPARED for value in path_parameters.values())
