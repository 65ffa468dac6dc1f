"""What the benchmarks share; nobody runs these files."""
