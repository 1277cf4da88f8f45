"""Opening of a dataset: a folder, or Python's standard library, which needs no download."""

import os
import platform
import shutil

from absl import logging

from sparsek.data.corpus import STDLIB, documents
from sparsek.data.token_files import (
  FORMAT_VERSION,
  TokenDataset,
  open_token_files,
  write_token_files,
)
from sparsek.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sparsek.errors import RunError, UsageError
from sparsek.storage.files import cache_folder
from sparsek.storage.new_folder import temporary_name


def open_data(
  data: str, tokenizer: str | None = None, fingerprint: str | None = None
) -> TokenDataset:
  """Opens a dataset.

  Args:
    data: a folder of token files, or "stdlib": the source text of Python's standard library, which
      is tokenised at first use (a few seconds) into $XDG_CACHE_HOME/sparsek or ~/.cache/sparsek.
    tokenizer: see `load_tokenizer`. "stdlib" is tokenised with it ("byte" by default); a folder
      must have been made with it.
    fingerprint: of that tokenizer as a run recorded it; see `load_tokenizer`.
  Raises:
    UsageError: if the data or the tokenizer cannot be read, or they do not belong together.
  """
  if data == STDLIB:
    return _open_stdlib(load_tokenizer(tokenizer or ByteTokenizer.name, fingerprint))
  dataset = open_token_files(data)
  if tokenizer is not None:
    given = load_tokenizer(tokenizer, fingerprint)
    if given.fingerprint != dataset.tokenizer.fingerprint:
      raise UsageError(
        f"tokenizer {tokenizer!r} ({_describe(given)}) does not match data {data!r}, which was "
        f"made with another ({_describe(dataset.tokenizer)})"
      )
  return dataset


def _describe(tokenizer: Tokenizer) -> str:
  return f"{tokenizer.name}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}"


def _open_stdlib(tokenizer: Tokenizer) -> TokenDataset:
  """Opens the token files of the standard library in the cache, and makes them if necessary."""
  made_by = f"{tokenizer.name}-{tokenizer.fingerprint[:12]}"
  name = f"{STDLIB}-python{platform.python_version()}-{made_by}-v{FORMAT_VERSION}"
  name += "-bos" if tokenizer.bos_ids else ""  # folders without this suffix may hold no bos
  folder = os.path.join(cache_folder(), name)
  try:
    if os.path.lexists(folder):
      try:
        return open_token_files(folder)
      except UsageError as error:
        logging.warning("making the cached corpus anew: %s", error)
        damaged = temporary_name(folder)
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    logging.info("Tokenising Python's standard library into %s", folder)
    write_token_files(folder, documents([STDLIB]), tokenizer, [STDLIB])
  except (OSError, RunError, UsageError) as error:
    # Another process may have made them in the meantime; those are as good.
    if not os.path.isdir(folder):
      raise UsageError(
        f"the corpus {STDLIB!r} could not be prepared in {folder} (XDG_CACHE_HOME "
        f"sets another place): {error}"
      ) from error
  return open_token_files(folder)
