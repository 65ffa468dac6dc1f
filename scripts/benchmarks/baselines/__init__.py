"""What plaintrain is measured against: a file for each, imported by the benchmarks that measure it."""
