"""Token files: a folder with tokenised documents, which is all that training needs.

tokens.bin      the ids of all documents one after the other, each ending with eos, and beginning
                with bos where meta.json says so; uint16, or uint32 if the vocabulary needs it
index.npy       int64 [num_documents + 1]: where each document starts in tokens.bin, in tokens
meta.json       format version, dtype, sizes, tokenizer, which documents are held out, checksums,
                sources
tokenizer.json  of a BPE; the byte tokenizer needs no file
documents.jsonl name, sha256, UTF-8 bytes and tokens of every document, in order, and whether it is
                held out; for people
uncounted.bin   a byte per token, 1 where the loss does not count it; only where documents have
                marked answers
"""

from sparsek.data.token_files.format import FORMAT_VERSION, read_meta
from sparsek.data.token_files.reading import (
  TokenDataset,
  TokenSplit,
  check_same,
  open_token_files,
  verify_token_files,
)
from sparsek.data.token_files.writing import check_can_make, write_token_files

__all__ = [
  "FORMAT_VERSION",
  "TokenDataset",
  "TokenSplit",
  "check_can_make",
  "check_same",
  "open_token_files",
  "read_meta",
  "verify_token_files",
  "write_token_files",
]
