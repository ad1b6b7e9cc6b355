"""What a program in Python does with the generated client, each module of which is imported too: it calls a control plane."""

import importlib
import pkgutil
import sys

import portcullis_client
from portcullis_client import AuthenticatedClient
from portcullis_client.api.keys import create_key, get_key, list_keys, revoke_key
from portcullis_client.models import CreateBody, Problem

modules = [module.name for module in pkgutil.walk_packages(portcullis_client.__path__, "portcullis_client.")]
for module in modules:
    importlib.import_module(module)

address, key = sys.argv[1:]


def caller(token):
    return AuthenticatedClient(address, token=token, prefix="", auth_header_name="X-API-Key")


client = caller(key)
body = CreateBody(email="client@portcullis.example", name="Generated client")
made = create_key.sync(client=client, body=body)
assert not isinstance(made, Problem) and made is not None, made
assert get_key.sync(made.id, client=client).name == "Generated client"
assert [key.id for key in list_keys.sync(client=client, email=body.email).keys] == [made.id]
assert revoke_key.sync_detailed(made.id, client=client).status_code == 204
assert str(get_key.sync(made.id, client=client).state) == "revoked"
refused = list_keys.sync(client=caller("sk_live_nobody"))
assert isinstance(refused, Problem) and refused.code == "unknown", refused
print(f"{len(modules)} modules of the Python client; created, read, listed and revoked a key with them")
