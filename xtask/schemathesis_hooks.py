"""Teaches schemathesis to write the bodies of imports: one object of JSON a line."""

import json

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def one_line(_context, value):
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
