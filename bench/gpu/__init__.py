"""Sections of ``python -m bench.gpu_report``."""
