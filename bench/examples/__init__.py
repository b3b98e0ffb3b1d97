"""Complete short programs: `python -m bench.examples.NAME`, run by the tests."""
