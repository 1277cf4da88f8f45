"""Reports of the train suite: the table, the summary and the picture of a record.

They are pure functions of the rows of `experiments.bench.training_step`.
"""

from collections.abc import Sequence
from typing import Any

from sparsek.errors import UsageError
from sparsek.experiments.bench.attention_report import aligned, number, quotient
from sparsek.experiments.reports import plots
from sparsek.training import trace

LABELS = {
  "sparsek": "sparsek",
  "full": "full attention",
  "pytorch_window": "PyTorch, FlexAttention",
  "transformers": "transformers",
  "transformers_layers": "transformers by layer",
}


def figure(row: dict, kind: str, what: str = "tokens_per_second") -> Any:
  """Returns a figure of a kind of attention; None where it was not run or failed."""
  return row["rivals"].get(kind, {}).get(what)


def label(row: dict, kind: str) -> str:
  """Returns the name of a kind of attention in tables."""
  if kind == "sliding_window":
    return f"sliding window {row['k'] + row['window']}"
  if kind == "pytorch_window":
    return f"{LABELS[kind]}, window {row['k'] + row['window']}"
  return LABELS[kind] + ", scorers' loss" * (kind == "sparsek" and bool(row.get("scorer_loss")))


# fields that identify the job of a row
IDENTITY = (
  "model",
  "n",
  "batch_size",
  "documents",
  "remat",
  "k",
  "window",
  "scorer_init_slope",
  "loss_chunk",
  "scorer_loss",
  "scorer_loss_kind",
)


def rows_to_keep(old: dict, record: dict) -> list[dict]:
  """Returns the rows of an older record, for one that extends it.

  Raises:
    UsageError: unless both are of the same device, commit and packages.
  """
  for name, there, here in (
    ("suite", old["suite"], record["suite"]),
    ("device", old["device"], record["device"]),
    *(
      (name, old["versions"].get(name), record["versions"].get(name))
      for name in ("commit", "packages")
    ),
  ):
    if there != here:
      raise UsageError(f"--extend: the record's {name} is {there}, here it is {here}")
  return old["rows"]


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
  """Returns all rows, sorted by documents and length; new ones replace old ones of the same job."""
  identity = lambda row: tuple(row.get(name) for name in IDENTITY)
  made = {identity(row) for row in new}
  return sorted(
    [*(row for row in old if identity(row) not in made), *new],
    key=lambda row: (row["documents"], row["n"]),
  )


def summary(rows: Sequence[dict], errors: None = None) -> list[dict]:
  """Computes the ratios for which there are goals, where the rows that they need exist.

  They are of the longest length and of a quarter of it.

  Returns:
    [{"what", "value"}].
  """
  few, loss_of = min(row["documents"] for row in rows), lambda row: row.get("scorer_loss") or 0
  alike = [
    row
    for row in rows
    if row["documents"] == few
    and row["remat"] == rows[0]["remat"]
    and loss_of(row) == min(map(loss_of, rows))
  ]
  by_length = {row["n"]: row for row in alike}
  longest = by_length[max(by_length)]
  quarter = by_length.get(longest["n"] // 4)
  lines = []

  def add(what, value):
    if value is not None:
      lines.append({"what": what, "value": value})

  for row in filter(None, (quarter, longest)):
    for kind in ("sliding_window", "pytorch_window", "full", "transformers", "transformers_layers"):
      add(
        f"tokens/s over those of {label(row, kind)} at {row['n']}",
        quotient(figure(row, "sparsek"), figure(row, kind)),
      )
  if quarter:
    add(
      f"tokens/s at {longest['n']} over tokens/s at {quarter['n']}",
      quotient(figure(longest, "sparsek"), figure(quarter, "sparsek")),
    )
  for row in rows:
    if row["documents"] > few and row["n"] in by_length:
      speeds = figure(row, "sparsek"), figure(by_length[row["n"]], "sparsek")
      add(
        f"tokens/s with {row['documents']} documents a row over {few} at {row['n']}",
        quotient(*speeds),
      )
    elif loss_of(row) and row["n"] in by_length and not loss_of(by_length[row["n"]]):
      add(
        f"tokens/s with the scorers' loss over those without at {row['n']}",
        quotient(figure(row, "sparsek"), figure(by_length[row["n"]], "sparsek")),
      )
  return lines


def table(rows: Sequence[dict]) -> list[str]:
  """Returns the lines of a table: one for each length and kind of attention."""
  lines = []
  for row in rows:
    for kind, result in row["rivals"].items():
      failed, mfu = result.get("failed"), result.get("mfu")
      speed = "out of memory" if failed == "out of memory" else "failed"
      lines.append(
        {
          "n": str(row["n"]),
          "rows": str(row["batch_size"]),
          "documents a row": str(row["documents"]),
          "remat": row["remat"],
          "attention": label(row, kind),
          "tokens/s": speed if failed else f"{result['tokens_per_second']:,.0f}",
          "ms a step": number(result.get("ms")),
          "MFU": "" if mfu is None else f"{mfu:.1%}",
          "TFLOP a step": number(result.get("step_tflop")),
          "MiB": number(result.get("mib")),
          "compiled in s": number(result.get("compile_seconds")),
        }
      )
  return aligned(lines)


def kinds_of_kernels(rows: Sequence[dict]) -> list[str]:
  """Returns the lines of a table: milliseconds a step of each kind of kernels, where traced."""
  lines = [
    {"n": str(row["n"]), "remat": row["remat"], "ms a step of": label(row, kind)}
    | {name: number(result["kinds_ms"].get(name)) for name, _ in trace.KINDS}
    for row in rows
    for kind, result in row["rivals"].items()
    if result.get("kinds_ms")
  ]
  return ["", *aligned(lines)] if lines else []


def failures(record: dict) -> list[str]:
  """Returns a line for each failure, except those for lack of memory."""
  return [
    f"{label(row, kind)}, n={row['n']}: {result['failed']}"
    for row in record["rows"]
    for kind, result in row["rivals"].items()
    if result.get("failed") not in (None, "out of memory")
  ]


def title(record: dict) -> str:
  """Returns the device, the model and its budget."""
  row = record["rows"][0]
  return f"{record['device']}, {row['model']}, k={row['k']} window={row['window']}"


def draw(path: str, record: dict) -> None:
  """Writes the picture: tokens per second against length."""
  curves: dict[str, list[tuple[int, float]]] = {}
  few = min(row["documents"] for row in record["rows"])
  for row in (row for row in record["rows"] if row["documents"] == few):
    for kind in row["rivals"]:
      if figure(row, kind) is not None:
        curves.setdefault(label(row, kind), []).append((row["n"], figure(row, kind)))
  plots.save_times(path, {"Training": curves}, title(record), "tokens per second")


def lines(record: dict) -> list[str]:
  """Returns the whole record as text, the summary last."""
  return [
    f"{title(record)}, JAX {record['versions']['packages']['jax']}: medians of "
    f"{record['rounds']} rounds; MFU of the attention that is computed; MiB: "
    "arguments, outputs and temporaries",
    *table(record["rows"]),
    *kinds_of_kernels(record["rows"]),
    "",
    *(f"{line['what']}: {number(line['value'])}" for line in record["summary"]),
  ]
