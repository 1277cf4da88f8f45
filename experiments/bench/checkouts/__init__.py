"""The parts of `experiments.bench.compare_checkouts`.

`report` belongs to the process that compares. `worker` runs in a process of each checkout and
imports the others, whose `sparsek` is then that of the checkout.
"""
