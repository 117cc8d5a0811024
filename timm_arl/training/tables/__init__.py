"""The paper's tables as benchmarks/reproduce_tables.py measures them: their rows, their figures, their pages."""
