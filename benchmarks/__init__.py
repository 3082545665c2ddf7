"""Benchmarks: ``pytest benchmarks`` runs them, ``python benchmarks/report.py`` turns their records into the README."""
