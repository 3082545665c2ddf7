"""Runs compiled kernels' PTX on the CPU: see machine.py."""
