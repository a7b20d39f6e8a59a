"""What phases cost beside their networks: a script for each, all with `python -m benchmarks`."""
