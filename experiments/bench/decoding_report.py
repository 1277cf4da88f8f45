"""The table, the summary and the picture of a record of `experiments.benchmark --suite=decode`:
pure functions of what `experiments.bench.decoding` found.
"""

from collections.abc import Sequence

from experiments.bench.attention_report import aligned, number, quotient
from experiments.bench.training_step_report import rows_to_keep  # noqa: F401  the same conditions
from experiments.reports import plots

LABELS = {"sparsek": "sparsek", "full": "full attention", "transformers": "transformers"}
IDENTITY = ("what", "model", "n", "batch_size", "k", "window", "gate")  # fields of a row


def figure(row: dict, kind: str, what: str = "ms") -> float | None:
  """A figure of a kind; None where it was not run or failed."""
  return row["rivals"].get(kind, {}).get(what)


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
  """All rows, decoding first, by rows and context; what was measured anew takes the place of what
  an old row has of the same kind.
  """
  identity = lambda row: tuple(row.get(name) for name in IDENTITY)
  rows = {identity(row): row for row in old}
  for row in new:
    before = rows.get(identity(row), {"rivals": {}})
    rows[identity(row)] = {**row, "rivals": before["rivals"] | row["rivals"]}
  return sorted(rows.values(), key=lambda row: (row["what"], row["batch_size"], row["n"]))


def summary(rows: Sequence[dict], errors: None = None) -> list[dict]:
  """[{"what", "value"}]: the ratios that goals are set for, wherever the rows to compute them
  exist.
  """
  lines = []

  def add(what, value):
    if value is not None:
      lines.append({"what": what, "value": value})

  for batch in sorted({row["batch_size"] for row in rows if row["what"] == "decode"}):
    group = {
      row["n"]: row for row in rows if row["what"] == "decode" and row["batch_size"] == batch
    }
    first, last = group[min(group)], group[max(group)]
    of = f"batch {batch}"
    if last is not first:
      add(
        f"{of}: latency at {last['n']} over latency at {first['n']}",
        quotient(figure(last, "sparsek"), figure(first, "sparsek")),
      )
      sizes = (figure(row, "sparsek", "cache_bytes") for row in (last, first))
      add(f"{of}: cache bytes at {last['n']} over those at {first['n']}", quotient(*sizes))
    if batch == 1:
      add(
        f"{of}: time to read the weights once over the time of a token at {first['n']}",
        quotient(first["weights_ms"], figure(first, "sparsek")),
      )
    for row in group.values():
      for rival in ("full", "transformers"):
        add(
          f"{of}: tokens/s over those of {LABELS[rival]} at {row['n']}",
          quotient(figure(row, rival), figure(row, "sparsek")),
        )
  for row in rows:
    if row["what"] == "prefill":
      add(
        f"prefill: tokens/s over those of full attention at {row['n']}",
        quotient(figure(row, "full"), figure(row, "sparsek")),
      )
  return lines


def table(rows: Sequence[dict]) -> list[str]:
  """Lines: one for every context, number of rows and kind."""
  lines = []
  for row in rows:
    for kind, found in row["rivals"].items():
      failed, size = found.get("failed"), found.get("cache_bytes")
      lines.append(
        {
          "": row["what"],
          "context": str(row["n"]),
          "rows": str(row["batch_size"]),
          "attention": LABELS[kind],
          "ms a token" if row["what"] == "decode" else "ms": failed
          if failed == "out of memory"
          else "failed"
          if failed
          else number(found["ms"]),
          "tokens/s": "" if failed else f"{found['tokens_per_second']:,.0f}",
          "cache MiB": "" if size is None else number(size / 2**20),
        }
      )
  return [
    line
    for what in ("decode", "prefill")
    for line in _section([line for line in lines if line[""] == what])
  ]


def _section(lines):
  return aligned(lines) if lines else []


def failures(record: dict) -> list[str]:
  """What failed for another reason than memory, a line each."""
  return [
    f"{row['what']}, {LABELS[kind]}, n={row['n']}, batch {row['batch_size']}: {found['failed']}"
    for row in record["rows"]
    for kind, found in row["rivals"].items()
    if found.get("failed") not in (None, "out of memory")
  ]


def title(record: dict) -> str:
  row = record["rows"][0]
  return f"{record['device']}, {row['model']}, k={row['k']} window={row['window']} {row['gate']}"


def curves(rows: Sequence[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
  """{"Batch 1" ...: {label: [(context, ms a token)]}}."""
  panels = {}
  for row in rows:
    for kind in LABELS:
      if row["what"] == "decode" and figure(row, kind) is not None:
        panels.setdefault(f"Batch {row['batch_size']}", {}).setdefault(LABELS[kind], []).append(
          (row["n"], figure(row, kind))
        )
  return panels or {
    "Prefill": {
      LABELS[kind]: [(row["n"], figure(row, kind)) for row in rows if figure(row, kind) is not None]
      for kind in ("sparsek", "full")
    }
  }


def draw(path: str, record: dict) -> None:
  """Writes the picture: milliseconds a token against the context, a panel for each number
  of rows.
  """
  plots.save_times(path, curves(record["rows"]), title(record), "milliseconds a token")


def lines(record: dict) -> list[str]:
  """The whole record as text, the summary last."""
  return [
    (
      f"{title(record)}, JAX {record['versions']['packages']['jax']}: medians of "
      f"{record['rounds']} rounds"
    ),
    *table(record["rows"]),
    "",
    *(f"{line['what']}: {number(line['value'])}" for line in record["summary"]),
  ]
