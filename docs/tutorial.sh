# Functions for the tutorials, for bash and zsh. Each tutorial reads this file in its first block.

# unique: ten hexadecimal digits, for addresses and names that can exist once. A tutorial can run twice in one second.
unique() { od -An -N5 -tx1 /dev/urandom | tr -d ' \n'; }

# as KEY …: curl with that key. An empty key makes no call.
as() {
  local caller="$1"
  shift
  if [ -z "$caller" ]; then
    echo 'as: the key of the caller is empty'
    return 1
  fi
  curl -sS -H "X-API-Key: $caller" -H 'Content-Type: application/json' "$@"
}

# api …: curl with the admin key.
api() { as "$ADMIN" "$@"; }

# pick FIELD …: fields of a JSON answer by their path. `*` stands for all members of a list, sorted, each once.
pick() {
  python3 -c '
import json, sys
def walk(value, names):
    if not names:
        return value
    name, rest = names[0], names[1:]
    if name == "*":
        found = {json.dumps(walk(member, rest)) for member in value}
        return [json.loads(text) for text in sorted(found)]
    try:
        return walk(value[int(name)] if isinstance(value, list) else value[name], rest)
    except (KeyError, IndexError, TypeError):
        return None
answer = json.load(sys.stdin)
found = [walk(answer, field.split(".")) for field in sys.argv[1:]]
print(*(value if isinstance(value, str) else json.dumps(value) for value in found))
' "$@"
}

# gate WANTED PATH …: asks Envoy until the answer has the wanted status or code, for some ten seconds.
# Prints the status and, of a refusal, the code.
gate() {
  local want="$1" url="$GATE$2" got=""
  shift 2
  for attempt in $(seq 50); do
    got=$(curl -sS -w ' %{http_code}' "$@" "$url" | tr -d '\n')
    got=$(printf '%s' "$got" | sed -e 's/.*"code":"\([a-z_]*\)".* \([0-9]*\)$/\2 \1/' -e 's/.* \([0-9]*\)$/\1/')
    case " $got " in *" $want "*) break ;; esac
    sleep 0.2
  done
  echo "$got"
}

# soon WANTED FIELD …: asks the REST API until the field has the wanted value, for some ten seconds. Prints the value.
soon() {
  local want="$1" field="$2" got=""
  shift 2
  for attempt in $(seq 50); do
    got=$(api "$@" | pick "$field")
    [ "$got" = "$want" ] && break
    sleep 0.2
  done
  echo "$got"
}
