"""Reports of records: tables, pictures, and the page docs/results.md."""
