"""Grids of training runs that differ in attention: cells, results, the table and the report."""

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sparsek.command_line import outputs
from sparsek.config import (
  ATTENTION_KINDS,
  fields_of_kind,
  fields_of_term,
  parse_layer_pattern,
  parse_term,
  whole_number,
)
from sparsek.errors import UsageError
from sparsek.evaluation.statistics import (
  Interval,
  bootstrap_ratio,
  holm,
  p_words,
  paired_t,
  t_interval,
)
from sparsek.experiments.reports import grid_page
from sparsek.runs import run_directory, run_record, settings
from sparsek.runs.metrics import read_metrics
from sparsek.runs.settings import Settings
from sparsek.storage import files

COLUMNS = ("attention", "k", "window", "gate", "scorer")
RESULT = "result.json"
DOCUMENTS = "heldout_documents"  # of a result and of metrics.jsonl
FIELDS = ("heldout_loss", "step", "tokens_per_second")  # of a result
MOST_NAME = 255  # bytes of a folder's name
# Files of a report, by what tells that they are of one, also of earlier versions.
REPORT = {
  "table.md": outputs.text("table of a grid", "| attention |"),
  "table.csv": outputs.text("table of a grid", "attention,k,window,"),
  "report.html": outputs.text("report of a grid", f"<h1>{grid_page.TITLE}</h1>"),
  "report.png": outputs.PICTURE,
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One training run; a setting is None where its kind of attention does not have it.

  Attributes:
    attention: a kind, or a pattern such as "sparsek*5+full".
  """

  attention: str
  k: int | None
  window: int | None
  gate: str | None
  scorer: str | None
  seed: int

  @property
  def name(self) -> str:
    """The name of its folder."""
    parts = [
      self.attention,
      self.k and f"k{self.k}",
      None if self.window is None else f"w{self.window}",
      self.gate,
      self.scorer,
      f"s{self.seed}",
    ]
    name = "-".join(part for part in parts if part).replace("*", "x").replace(":", "_")
    if len(name) <= MOST_NAME:
      return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[:64]}...{digest}-s{self.seed}"

  def budget(self, num_kv_heads: int = 1) -> int | None:
    """Returns the most keys and values that a query attends to, the mean over layers and KV heads;
    None: all.

    The linear kind's state, as large as head_dim keys, is not counted.

    Args:
      num_kv_heads: of the model; it matters where a term names heads.
    """
    terms = [parse_term(term) for term in terms_of(self.attention)]
    if any(term.kind == "full" for term in terms):
      return None
    keys = 0.0
    for kind, k, window, own in terms:
      k, window = (
        (self.k if k is None else k) or 0,
        (self.window if window is None else window) or 0,
      )
      sizes = [(num_kv_heads, k, window)]
      if own is not None:
        of_own = k if own.k is None else own.k, window if own.window is None else own.window
        sizes = [(num_kv_heads - len(own.heads), k, window), (len(own.heads), *of_own)]
      for heads, k, window in sizes:
        keys += heads / num_kv_heads * (window + (k if "k" in fields_of_kind(kind) else 0))
    return round(keys / len(terms))

  def given(self) -> dict[str, Any]:
    """Returns the settings that it has, by their names."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

  def flags(self) -> list[str]:
    """Returns the flags of experiments.pretrain."""
    values = self.given()
    if self.attention not in ATTENTION_KINDS:
      values["layer_pattern"] = values.pop("attention").replace("+", ",")
    return [f"--{name}={value}" for name, value in values.items()]


def patterns(text: str) -> list[str]:
  """Reads --attention: kinds, or patterns of layers, separated by commas.

  Raises:
    UsageError: for others.
  """
  values = text.split(",")
  for value in values:
    try:
      terms_of(value)
    except ValueError:
      raise UsageError(
        f"--attention={text}: {value!r} must be one of {', '.join(ATTENTION_KINDS)}, or of "
        "these a pattern of layers such as sparsek*5+full"
      ) from None
  return values


def terms_of(attention: str) -> tuple[str, ...]:
  """Returns the layers of a pattern, as `sparsek.config.parse_layer_pattern` does."""
  return parse_layer_pattern(attention.replace("+", ","))


def grid(
  attention: Sequence[str],
  k: Sequence[int],
  window: Sequence[int],
  gate: Sequence[str],
  scorer: Sequence[str],
  seeds: int,
) -> list[Cell]:
  """Returns all distinct combinations: settings that a kind does not have are None.

  Seeds change slowest, so that all kinds have a figure early.
  """
  cells = []
  settings_of = itertools.product(k, window, gate, scorer)
  for seed, kind, values in itertools.product(range(seeds), attention, settings_of):
    used = {name for term in terms_of(kind) for name in fields_of_term(term)}
    chosen: dict[str, Any] = dict(zip(COLUMNS[1:], values))
    cell = Cell(
      kind, seed=seed, **{name: chosen[name] if name in used else None for name in chosen}
    )
    cells.append(cell)
  return list(dict.fromkeys(cells))


def share(cells: Sequence[Cell], job: str) -> list[Cell]:
  """Returns the cells of job "i/N" of N that share a grid; raises UsageError for another text."""
  numbers = [whole_number(text) for text in job.split("/")]
  i, jobs = numbers if len(numbers) == 2 else (None, None)
  if i is None or jobs is None or i >= jobs:
    raise UsageError(f"--job={job}: must be i/N with i from 0 to N - 1, such as 0/4")
  return list(cells)[i::jobs]


def result_of(workdir: str) -> dict:
  """Returns the held-out loss, step and speed at the end of a finished run, and its documents.

  The documents are None where an older version trained it. The speed is None where no step but the
  first was logged, in which everything is compiled.

  Raises:
    UsageError: where it was never evaluated.
  """
  records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
  losses = [record for record in records if "heldout_loss" in record]
  if not losses or losses[-1]["step"] != records[-1]["step"]:
    raise UsageError(
      f"{workdir} has no held-out loss at its end: the grid needs --eval_every above 0"
    )
  # Version 0.1 logged a speed of step 1.
  speeds = [
    record["tokens_per_second"]
    for record in records
    if "tokens_per_second" in record and record["step"] > 1
  ]
  return {
    "heldout_loss": losses[-1]["heldout_loss"],
    "step": losses[-1]["step"],
    "tokens_per_second": statistics.median(speeds) if speeds else None,
    DOCUMENTS: losses[-1].get(DOCUMENTS),
  }


def is_complete(workdir: str, num_steps: int) -> bool:
  """Returns whether a run has made all its steps, and was not stopped by a signal."""
  records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
  return bool(records) and records[-1]["step"] >= num_steps


def read_result(folder: str) -> dict | None:
  """Returns what `save_result` wrote into a cell's folder; None: the cell is not finished."""
  path = os.path.join(folder, RESULT)
  if not os.path.exists(path):
    return None
  result = files.read_json_object(path)
  wrong = [name for name in FIELDS if not _is_number(result.get(name))]
  if result.get("tokens_per_second", "") is None:  # not measured
    wrong.remove("tokens_per_second")
  if wrong:
    raise UsageError(f"{path} has no number {wrong[0]!r}: remove it to read the cell again")
  if not _are_documents(result.get(DOCUMENTS)):
    raise UsageError(f"{path} has no lists {DOCUMENTS!r}: remove it to read the cell again")
  return result


def _are_documents(value: Any) -> bool:
  """Returns whether a JSON value holds the losses of documents, or is null."""
  if value is None:
    return True
  names = ("index", "loss_sum", "num_targets")
  lists: list[Any] = [value.get(name) for name in names] if isinstance(value, dict) else []
  return (
    all(isinstance(of, list) and all(map(_is_number, of)) for of in lists)
    and len({len(of) for of in lists}) == 1
    and all(count > 0 for count in lists[-1])
  )


def _is_number(value: object) -> bool:
  """Returns whether a JSON value is a number, no NaN and none of too many digits for a float."""
  largest = sys.float_info.max
  return type(value) in (int, float) and -largest <= value <= largest  # type: ignore[operator]


def save_result(folder: str, dataset: str) -> None:
  """Marks a cell as finished, with its result and the fingerprint of its training data."""
  content = json.dumps({**result_of(folder), "dataset": dataset})
  files.save(os.path.join(folder, RESULT), content)


def stale(folder: str, wanted: Settings, dataset: str) -> list[str]:
  """Returns how the run in a cell's folder differs from the wanted one, a line a flag.

  The training data of a finished cell are compared by the fingerprint in its mark, or without one
  by the folder of --data; those of an unfinished cell are compared when it is resumed.

  Args:
    folder: of the cell; need not exist.
    wanted: the settings that it should have.
    dataset: fingerprint of the tokens that it should learn from.
  """
  result = read_result(folder)
  try:
    made = settings.of_folder(folder)
  except UsageError as error:
    return [str(error)]
  if result and not made:
    return ["it has no flags.txt that says what made it"]
  there = (result or {}).get("dataset")
  if result is None or there:
    made = [{**one, "data": wanted["data"]} for one in made]
  lines = [line for one in made for line in settings.differences(one, wanted)]
  if there and there != dataset:
    lines.append(f"the tokens of --data: {there[:12]} -> {dataset[:12]}")
  return list(dict.fromkeys(lines))


def clear(
  folders: Mapping[Cell, str],
  wanted: Mapping[Cell, Settings],
  dataset: str,
  workdir: str,
  retrain: bool = False,
) -> None:
  """Makes sure that no cell holds a run of other flags.

  Args:
    folders: of the cells.
    wanted, dataset: as in `stale`, for each cell.
    workdir: of the grid.
    retrain: move such cells aside.
  Raises:
    UsageError: without `retrain`, where there is such a cell; nothing has changed then.
  """
  differing = {cell: stale(folders[cell], wanted[cell], dataset) for cell in folders}
  if not retrain:
    settings.refuse({cell.name: lines for cell, lines in differing.items()}, workdir)
  for cell in folders:
    if differing[cell] and stale(
      folders[cell], wanted[cell], dataset
    ):  # unless another job has moved it already
      settings.move_aside(folders[cell])


def in_use(folder: str) -> bool:
  """Returns whether a process trains in a folder."""
  try:
    run_directory.lock(folder).close()
  except UsageError as error:
    return "in use" in str(error)
  return False


def collect(folder: str, cells: Sequence[Cell]) -> list[dict]:
  """Returns the finished cells' fields and results."""
  results = {cell: read_result(os.path.join(folder, cell.name)) for cell in cells}
  return [
    {
      **dataclasses.asdict(cell),
      "budget": cell.budget(_kv_heads(os.path.join(folder, cell.name), cell)),
      **{name: result[name] for name in FIELDS},
      DOCUMENTS: result.get(DOCUMENTS),
    }
    for cell, result in results.items()
    if result
  ]


def _kv_heads(folder: str, cell: Cell) -> int:
  """Returns the KV heads of a cell's run, 1 where its budget does not depend on them."""
  if all(parse_term(term).own is None for term in terms_of(cell.attention)):
    return 1
  return run_record.load_run_config(folder)[0].num_kv_heads


def other_finished(folder: str, cells: Sequence[Cell]) -> list[str]:
  """Returns the names of finished cells in a folder that are none of these."""
  found = glob.glob(os.path.join(glob.escape(folder), "*", RESULT))
  return sorted(
    {os.path.basename(os.path.dirname(path)) for path in found} - {c.name for c in cells}
  )


def summarize(rows: Sequence[dict]) -> list[dict]:
  """Returns one row for all seeds of a setting, best first.

  A row has the mean held-out loss, its 95 % t interval (None for one seed), the median speed (None
  where none was measured), a bootstrap interval over documents (None where not all runs have the
  same documents, two or more), and a comparison with the best row over the seeds that both have
  (None for fewer than two), its p value corrected for all rows. Runs of a seed share their start
  and the order of their data.
  """
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    groups.setdefault(tuple(row[name] for name in COLUMNS), []).append(row)
  summary = []
  for key, group in groups.items():
    losses = [row["heldout_loss"] for row in group]
    speeds = [s for row in group if (s := row["tokens_per_second"]) is not None]
    summary.append(
      {
        **dict(zip(COLUMNS, key)),
        "budget": group[0]["budget"],
        "seeds": len(group),
        "heldout_loss": statistics.fmean(losses),
        "interval": t_interval(losses) if len(losses) > 1 else None,
        "over_documents": over_documents([row.get(DOCUMENTS) for row in group]),
        "by_seed": {row["seed"]: row["heldout_loss"] for row in group},
        "tokens_per_second": statistics.median(speeds) if speeds else None,
      }
    )
  summary.sort(key=lambda row: row["heldout_loss"])
  return _compared(summary)


def over_documents(documents: Sequence[Mapping | None]) -> Interval | None:
  """Returns the loss of a setting's runs, the mean over seeds, with an interval over documents."""
  known = [of for of in documents if of is not None]
  if not known or len(known) < len(documents) or len(known[0]["index"]) < 2:
    return None
  index, counts = known[0]["index"], known[0]["num_targets"]
  if any((of["index"], of["num_targets"]) != (index, counts) for of in known):
    return None
  means = [statistics.fmean(losses) for losses in zip(*(of["loss_sum"] for of in known))]
  return bootstrap_ratio(means, counts)


def _compared(summary: list[dict]) -> list[dict]:
  """Returns rows, best first, with "minus_best" in place of "by_seed"."""
  best, pairs = summary[0]["by_seed"] if summary else {}, []
  for row in summary:
    losses = row.pop("by_seed")
    shared = sorted(set(losses) & set(best))
    is_compared = row is not summary[0] and len(shared) > 1
    here, there = ([by_seed[seed] for seed in shared] for by_seed in (losses, best))
    pairs.append(paired_t(here, there) if is_compared else None)
  corrected = iter(holm([pair.p_value for pair in pairs if pair]))
  return [
    {**row, "minus_best": pair and pair._replace(p_value=next(corrected))}
    for row, pair in zip(summary, pairs)
  ]


def markdown(summary: Sequence[dict]) -> str:
  """Returns a summary as a table in Markdown."""
  lines = [
    (
      "| attention | k | window | gate | scorer | keys per query | seeds | held-out "
      "loss (nats per token) | over documents | minus the best | tokens/s |"
    ),
    "|" + "---|" * 11,
  ]
  for row in summary:
    interval, pair = row["interval"], row["minus_best"]
    over = row["over_documents"]
    brackets = f" ({interval.low:.4f} to {interval.high:.4f})" if interval else ""
    cells = [
      *("" if row[name] is None else str(row[name]) for name in COLUMNS),
      "all" if row["budget"] is None else str(row["budget"]),
      str(row["seeds"]),
      f"{row['heldout_loss']:.4f}{brackets}",
      f"{over.low:.4f} to {over.high:.4f}" if over else "-",
      f"{pair.difference:+.4f}, {p_words(pair.p_value)}" if pair else "-",
      "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def about(summary: Sequence[dict]) -> str:
  """Returns what the intervals and p values of the table are, and what the runs do not give."""
  compared = sum(row["minus_best"] is not None for row in summary)
  text = (
    "In brackets: 95 % t interval over seeds. Over documents: 95 % bootstrap interval of the mean "
    "over seeds. Minus the best: over the seeds that both have, p of paired t tests, corrected "
    f"(Holm) for {compared} comparison{'s' * (compared != 1)}."
  )
  if compared < len(summary) - 1:
    text += " - in that column: fewer than two seeds."
  if not all(row["over_documents"] for row in summary):
    text += (
      " - over documents: fewer than two, not the same in all seeds, or not recorded, as by "
      "version 0.1."
    )
  return text


def as_csv(rows: Sequence[dict]) -> str:
  """Returns all runs as CSV, for other programs, without their documents."""
  out = io.StringIO()
  names = [name for name in rows[0] if name != DOCUMENTS]
  writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def check_report(workdir: str) -> None:
  """Raises UsageError where `write_report` would replace files that are not of a report."""
  for name, kind in REPORT.items():
    path = os.path.join(workdir, name)
    if files.exists(path):
      outputs.check(f"--workdir={workdir}: its file {name}", path, kind)


def write_report(workdir: str, rows: Sequence[dict], shared: str, draws: bool = True) -> None:
  """Writes table.md, table.csv, report.png and report.html, or nothing where there are no rows.

  Args:
    workdir: of the grid.
    rows: as `collect` returns them.
    shared: the flags that all runs share, one a line.
    draws: make pictures, which need matplotlib.
  Raises:
    RunError: where a file cannot be written.
  """
  if not rows:
    return
  summary = summarize(rows)
  table, pictures = markdown(summary), grid_page.pictures(summary) if draws else []
  page = grid_page.page(summary, pictures, table, about(summary), shared)
  contents: dict[str, str | bytes] = {
    "table.md": f"{table}\n{about(summary)}\n",
    "table.csv": as_csv(rows),
    "report.html": page,
  }
  if draws:
    contents["report.png"] = grid_page.png(pictures)
  for name, content in contents.items():
    files.save(os.path.join(workdir, name), content)
