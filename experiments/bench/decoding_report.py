"""Reports of the decode suite: the table, the summary and the picture of a record.

They are pure functions of the rows of `experiments.bench.decoding`.
"""

from collections.abc import Sequence
from typing import Any

from sparsek.experiments.bench.attention_report import aligned, number, quotient
from sparsek.experiments.bench.training_step_report import rows_to_keep as rows_to_keep
from sparsek.experiments.reports import plots

LABELS = {"sparsek": "sparsek", "full": "full attention", "transformers": "transformers"}
PICTURE_NAMES = {"sparsek": "SPARSEK", "transformers": "full attention (transformers)"}
# fields that identify the job of a row
IDENTITY = ("what", "model", "n", "batch_size", "k", "window", "gate")


def figure(row: dict, kind: str, what: str = "ms") -> Any:
  """Returns a figure of a kind; None where it was not run or failed."""
  return row["rivals"].get(kind, {}).get(what)


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
  """Returns all rows, decoding first, sorted by number of texts and context.

  New figures replace those of an old row of the same kind.
  """
  identity = lambda row: tuple(row.get(name) for name in IDENTITY)
  rows = {identity(row): row for row in old}
  for row in new:
    before = rows.get(identity(row), {"rivals": {}})
    rows[identity(row)] = {**row, "rivals": before["rivals"] | row["rivals"]}
  return sorted(rows.values(), key=lambda row: (row["what"], row["batch_size"], row["n"]))


def summary(rows: Sequence[dict], errors: None = None) -> list[dict]:
  """Computes the ratios for which there are goals, where the rows that they need exist.

  Returns:
    [{"what", "value"}].
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
      for baseline in ("full", "transformers"):
        add(
          f"{of}: tokens/s over those of {LABELS[baseline]} at {row['n']}",
          quotient(figure(row, baseline), figure(row, "sparsek")),
        )
  for row in rows:
    if row["what"] == "prefill":
      add(
        f"prefill: tokens/s over those of full attention at {row['n']}",
        quotient(figure(row, "full"), figure(row, "sparsek")),
      )
  return lines


def table(rows: Sequence[dict]) -> list[str]:
  """Returns the lines of a table: one for each context, number of texts and kind."""
  lines = []
  for row in rows:
    for kind, result in row["rivals"].items():
      failed, size = result.get("failed"), result.get("cache_bytes")
      time = "out of memory" if failed == "out of memory" else "failed"
      lines.append(
        {
          "": row["what"],
          "context": str(row["n"]),
          "rows": str(row["batch_size"]),
          "attention": LABELS[kind],
          "ms a token" if row["what"] == "decode" else "ms": time
          if failed
          else number(result["ms"]),
          "tokens/s": "" if failed else f"{result['tokens_per_second']:,.0f}",
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
  """Returns a line for each failure, except those for lack of memory."""
  return [
    f"{row['what']}, {LABELS[kind]}, n={row['n']}, batch {row['batch_size']}: {result['failed']}"
    for row in record["rows"]
    for kind, result in row["rivals"].items()
    if result.get("failed") not in (None, "out of memory")
  ]


def title(record: dict) -> str:
  """Returns the device, the model and its budget."""
  row = record["rows"][0]
  return f"{record['device']}, {row['model']}, k={row['k']} window={row['window']} {row['gate']}"


def curves(rows: Sequence[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
  """Returns {"Batch 1" ...: {label: [(context, ms a token)]}}; without any, those of prompts."""
  panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
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
  """Writes the picture: milliseconds a token against the context, a panel for each batch size."""
  panels = {
    title: {PICTURE_NAMES.get(label, label): points for label, points in lines.items()}
    for title, lines in curves(record["rows"]).items()
  }
  plots.save_times(path, panels, title(record), "milliseconds a token")


def lines(record: dict) -> list[str]:
  """Returns the whole record as text, the summary last."""
  return [
    (
      f"{title(record)}, JAX {record['versions']['packages']['jax']}: medians of "
      f"{record['rounds']} rounds"
    ),
    *table(record["rows"]),
    "",
    *(f"{line['what']}: {number(line['value'])}" for line in record["summary"]),
  ]
