"""One file per client that `benchmarks/binders.py` compares: each raw client, FastStream, and Kassa's binders."""
