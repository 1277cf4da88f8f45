"""Changes of bytes and of JSON, drawn by a `random.Random`, as disks and editors make them."""

import copy
import json
import random

SCALARS = (
  None,
  True,
  False,
  0,
  -1,
  1,
  2,
  3,
  7,
  16,
  255,
  256,
  65536,
  2**31 - 1,
  2**31,
  2**32,
  2**53 + 1,
  2**63,
  10**20,
  -(2**63),
  0.0,
  -0.0,
  0.5,
  1.5,
  1e-38,
  1e38,
  1e308,
  float("nan"),
  float("inf"),
  float("-inf"),
  "",
  " ",
  "a",
  "0",
  "8",
  "nan",
  "full",
  "byte",
  "../x",
  "/dev/zero",
  "\0",
  "\ud800",
  "é",
  "x" * 5000,
)
RAW = (
  b"1" * 21,
  b"1" * 5000,
  b"1e999",
  b"-1e999",
  b"NaN",
  b"[" * 100_000,
  b'{"a":' * 20_000,
  b"\xff\xfe",
  b"\xef\xbb\xbf",
  b"\0",
  b"\r",
  b"\n",
  b'"',
  b"\\",
  b"{",
  b"}",
  b"[",
  b"]",
  b",",
  b":",
  b"//",
  b"\xed\xa0\x80",
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """Returns other bytes: bits flipped, pieces replaced, removed, repeated or inserted."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    at, size = rng.randrange(len(data) + 1), min(rng.choice((1, 1, 2, 4, 8, 32, 200)), 200)
    kind = rng.randrange(9)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
      data[at] = rng.randrange(256)
    elif kind == 2:
      del data[at : at + size]
    elif kind == 3:
      data[at:at] = data[at : at + size] or b"x"
    elif kind == 4:
      data[at:at] = rng.choice(RAW)
    elif kind == 5:
      del data[at:]
    elif kind == 6:
      data[at : at + size] = rng.randbytes(size)
    elif kind == 7:
      other = rng.randrange(len(data) + 1)
      data[at : at + size], data[other : other + size] = (
        data[other : other + size],
        data[at : at + size],
      )
    elif kind == 8:
      data += rng.choice((b"\n", b"\0" * 8, rng.randbytes(16), bytes(data[:size])))
  return bytes(data) if bytes(data) != content else bytes(data) + b"\n"


def _places(value, path=()) -> list[tuple]:
  """Returns the paths to everything inside a JSON value."""
  items = (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  return [path] * bool(path) + [
    place for key, inner in items for place in _places(inner, (*path, key))
  ]


def _another(value, rng: random.Random):
  """Returns something to put where `value` was."""
  choice = rng.randrange(6)
  if choice == 0 and isinstance(value, (int, float)) and not isinstance(value, bool):
    return value + rng.choice((-1, 1, -2, 1000))
  if choice == 1 and isinstance(value, (int, float)):
    return str(value)
  if choice == 2:
    return rng.choice(([], {}, [value], {"a": value}, [value, value]))
  if choice == 3 and isinstance(value, str) and value:
    at = rng.randrange(len(value))
    return value[:at] + chr(rng.choice((48, 57, 97, 122, 0x20AC))) + value[at + 1 :]
  return rng.choice(SCALARS)


def mutate_value(value, rng: random.Random):
  """Returns a JSON value of which one or two parts are others, gone, or under another name."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2))):
    places = _places(value)
    if not places:
      return _another(value, rng)
    *path, key = rng.choice(places)
    parent = value
    for step in path:
      parent = parent[step]
    kind = rng.randrange(8)
    if kind == 0:
      del parent[key]
    elif kind == 1 and isinstance(parent, dict):
      parent[rng.choice((key + "x", key.upper(), "", "é", "attention"))] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
      parent.insert(
        rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice((parent[key], *SCALARS)))
      )
    else:
      parent[key] = _another(parent[key], rng)
  return value


def mutate_json(content: bytes, rng: random.Random) -> bytes:
  """Returns other JSON, or bytes that were JSON."""
  if rng.random() < 0.35:
    return mutate_bytes(content, rng)
  changed = json.dumps(
    mutate_value(json.loads(content), rng),
    ensure_ascii=rng.random() < 0.8,
    indent=rng.choice((None, 1)),
  )
  if rng.random() < 0.05:  # a key twice
    changed = changed.replace("{", '{"a": 1, "a": 2, ', 1)
  return changed.encode("utf-8", "surrogatepass")


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
  """Returns a changed file of JSON lines: one of them is changed, or their order."""
  if rng.random() < 0.35:
    return mutate_bytes(content, rng)
  lines = content.splitlines(keepends=True)
  at = rng.randrange(len(lines))
  kind = rng.randrange(5)
  if kind == 0:
    lines.insert(at, lines[rng.randrange(len(lines))])
  elif kind == 1:
    lines.insert(
      at,
      rng.choice(
        (
          b"a note\n",
          b'"text"\n',
          b"[1, 2]\n",
          b"\n",
          b'{"mine": 1}\n',
          b"7\n",
          b"null\n",
          b"\xff\xfe\n",
          b"NaN\n",
          b"{}\r\n",
        )
      ),
    )
  elif kind == 2:
    rng.shuffle(lines)
  else:
    lines[at] = json.dumps(mutate_value(json.loads(lines[at]), rng)).encode() + b"\n"
  return b"".join(lines)
