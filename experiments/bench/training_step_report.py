"""The table, the summary and the picture of a record of `experiments.benchmark --suite=train`: pure
functions of what `experiments.bench.training_step` found.
"""

from collections.abc import Sequence

from experiments.bench.attention_report import aligned, number, quotient
from experiments.reports import plots
from sparsek.errors import UsageError

LABELS = {
  "sparsek": "sparsek",
  "full": "full attention",
  "transformers": "transformers",
  "transformers_layers": "transformers by layer",
}


def figure(row: dict, kind: str, what: str = "tokens_per_second") -> float | None:
  """A figure of a kind of attention; None where it was not run or failed."""
  return row["rivals"].get(kind, {}).get(what)


def label(row: dict, kind: str) -> str:
  loss = ", scorers' loss" if kind == "sparsek" and row.get("scorer_loss") else ""
  return (
    f"sliding window {row['k'] + row['window']}"
    if kind == "sliding_window"
    else LABELS[kind] + loss
  )


# fields of a row
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
)


def rows_to_keep(old: dict, record: dict) -> list[dict]:
  """The rows of an older record, for one that extends it; raises UsageError unless both are of the
  same device, commit and packages.
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
  """All rows by documents, then length; a new one takes the place of an old one of the same
  problem.
  """
  identity = lambda row: tuple(row.get(name) for name in IDENTITY)
  made = {identity(row) for row in new}
  return sorted(
    [*(row for row in old if identity(row) not in made), *new],
    key=lambda row: (row["documents"], row["n"]),
  )


def summary(rows: Sequence[dict], errors: None = None) -> list[dict]:
  """[{"what", "value"}]: the ratios that goals are set for, at the longest length and a quarter of
  it, wherever the rows to compute them exist.
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
    for rival in ("sliding_window", "full", "transformers", "transformers_layers"):
      add(
        f"tokens/s over those of {label(row, rival)} at {row['n']}",
        quotient(figure(row, "sparsek"), figure(row, rival)),
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
  """Lines: one a row for every length and kind of attention."""
  lines = []
  for row in rows:
    for kind, found in row["rivals"].items():
      failed, mfu = found.get("failed"), found.get("mfu")
      lines.append(
        {
          "n": str(row["n"]),
          "rows": str(row["batch_size"]),
          "documents a row": str(row["documents"]),
          "remat": row["remat"],
          "attention": label(row, kind),
          "tokens/s": failed
          if failed == "out of memory"
          else "failed"
          if failed
          else f"{found['tokens_per_second']:,.0f}",
          "ms a step": number(found.get("ms")),
          "MFU": "" if mfu is None else f"{mfu:.1%}",
          "TFLOP a step": number(found.get("step_tflop")),
          "MiB": number(found.get("mib")),
          "compiled in s": number(found.get("compile_seconds")),
        }
      )
  return aligned(lines)


def failures(record: dict) -> list[str]:
  """What failed for another reason than memory, a line each."""
  return [
    f"{label(row, kind)}, n={row['n']}: {found['failed']}"
    for row in record["rows"]
    for kind, found in row["rivals"].items()
    if found.get("failed") not in (None, "out of memory")
  ]


def title(record: dict) -> str:
  row = record["rows"][0]
  return f"{record['device']}, {row['model']}, k={row['k']} window={row['window']}"


def draw(path: str, record: dict) -> None:
  """Writes the picture: tokens per second against length."""
  curves, few = {}, min(row["documents"] for row in record["rows"])
  for row in (row for row in record["rows"] if row["documents"] == few):
    for kind in row["rivals"]:
      if figure(row, kind) is not None:
        curves.setdefault(label(row, kind), []).append((row["n"], figure(row, kind)))
  plots.save_times(path, {"Training": curves}, title(record), "tokens per second")


def lines(record: dict) -> list[str]:
  """The whole record as text, the summary last."""
  return [
    f"{title(record)}, JAX {record['versions']['packages']['jax']}: medians of "
    f"{record['rounds']} rounds; MFU of the attention that is computed; MiB: "
    "arguments, outputs and temporaries",
    *table(record["rows"]),
    "",
    *(f"{line['what']}: {number(line['value'])}" for line in record["summary"]),
  ]
